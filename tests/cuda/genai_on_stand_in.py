"""BUNDLE: generates with onnxruntime-genai-cuda, which PYTHONPATH names with onnxruntime-gpu, by the genai_config.json of BUNDLE
as it is. Prints JSON: the ``device`` that the model is on, kernel ``calls`` of the library that it names, and how many
``tokens`` were generated, which mean nothing.
"""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

from qsparse_export.runtimes.ort.library import CUDA_LIBRARY_NAME, open_library

BUNDLE = Path(sys.argv[1])
PROMPT, TOKENS = [1, 3, 5, 7, 9], 6

model = og.Model(str(BUNDLE))
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(PROMPT) + TOKENS, min_length=len(PROMPT) + TOKENS)
generator = og.Generator(model, params)
generator.append_tokens(PROMPT)
while not generator.is_done():
    generator.generate_next_token()
tokens = len(generator.get_sequence(0)) - len(PROMPT)
calls = open_library(BUNDLE / CUDA_LIBRARY_NAME).calls()
print(json.dumps({"device": model.device_type, "tokens": tokens, "calls": calls}))
