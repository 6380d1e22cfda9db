"""Instructions per token on ARM: the only figure of cost that an emulator can give, and that it repeats."""

import pytest
from instructions import per_token

# The dot product does in one instruction what takes several without; kernels that skip do less than bodies that do not.


@pytest.fixture(scope="module")
def counted(bundle, emulator, onnxruntime):
    made = bundle("bitnet")
    cases = [(cpu, mode) for cpu in ("cortex-a53", "cortex-a76") for mode in ("native", "bodies")]
    return {(cpu, mode): per_token(emulator(cpu), made.path, onnxruntime, mode) for cpu, mode in cases}


@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a76"])
def test_kernels_execute_fewer_instructions_than_bodies(counted, cpu):
    assert 0 < counted[cpu, "native"] < counted[cpu, "bodies"]


def test_dot_product_saves_instructions(counted):
    assert counted["cortex-a76", "native"] < counted["cortex-a53", "native"]


def test_counts_repeat(counted, bundle, emulator, onnxruntime):
    again = per_token(emulator("cortex-a76"), bundle("bitnet").path, onnxruntime, "native")
    assert again == pytest.approx(
        counted["cortex-a76", "native"], rel=0.05
    )  # loading varies by up to 80,000 of 150 million
