"""Makes the modules of this folder, and the cases of the C++ kernels, importable."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]
