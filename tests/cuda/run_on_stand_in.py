"""LIBRARY ARGUMENT...: the command qsparse-run, on the CUDA provider of onnxruntime-gpu, which PYTHONPATH names, with LIBRARY
in the place of the one that nvcc builds."""

import sys
from pathlib import Path

from qsparse_export.cli.run import main
from qsparse_export.runtimes.ort import cuda_build

library = Path(sys.argv[1])
cuda_build.build = lambda *_: library
sys.exit(main(sys.argv[2:]))
