"""TVM is imported without PyTorch where nothing has imported that yet, and PyTorch can be imported afterwards."""

import subprocess
import sys

import pytest

AFTERWARDS = """
import sys
{before}
from qsparse_export.runtimes.tvm import environment
environment.tvm()
print("torch" in sys.modules)
import torch
print(torch.ones(2).sum().item(), environment.tvm().runtime.tensor(torch.ones(2).numpy()).numpy().sum())
"""


@pytest.mark.parametrize(("before", "is_there"), [("", "False"), ("import torch", "True")])
def test_pytorch_is_left_out_and_left_whole(before: str, is_there: str) -> None:
    command = [sys.executable, "-P", "-c", AFTERWARDS.format(before=before)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [is_there, "2.0", "2.0"]


def test_a_measured_process_has_no_pytorch() -> None:
    code = "import sys; from qsparse_export.bench import session_process as measured; measured._import_runtime('tvm')"
    command = [sys.executable, "-P", "-c", f"{code}; assert 'tvm' in sys.modules and 'torch' not in sys.modules"]
    subprocess.run(command, check=True)
