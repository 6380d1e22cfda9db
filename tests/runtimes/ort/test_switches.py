"""QSPARSE_SPIN reaches ONNX Runtime; another word than 0 or 1 is refused there and for QSPARSE_HUGE_PAGES."""

import numpy as np
import onnxruntime
import pytest
import torch

import qsparse_export as qs
from qsparse_export.errors import UsageError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    linear, x = torch.nn.Linear(4, 3), torch.zeros(2, 4)
    return qs.export(linear, example_inputs=(x,), verify="none", out=tmp_path_factory.mktemp("bundles") / "linear")


@pytest.mark.parametrize(("word", "expected"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_threads_spin_where_the_user_says_so(bundle, monkeypatch, word, expected):
    from qsparse_export.runtimes import get_runtime

    entries = {}

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key, value):
            entries[key] = value
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    if word is None:
        monkeypatch.delenv("QSPARSE_SPIN", raising=False)
    else:
        monkeypatch.setenv("QSPARSE_SPIN", word)
    session = get_runtime("ort").open(bundle.path, threads=1, native=False)
    assert entries["session.intra_op.allow_spinning"] == expected
    assert 0 < int(entries["session.intra_op.spin_duration_us"]) <= 1000  # the runtime itself would spin for 16 ms
    assert session.run({session.input_names[0]: np.zeros((2, 4), np.float32)})


@pytest.mark.parametrize("variable", ["QSPARSE_SPIN", "QSPARSE_HUGE_PAGES"])
def test_another_word_is_refused(bundle, monkeypatch, variable):
    from qsparse_export.runtimes import get_runtime

    monkeypatch.setenv(variable, "yes")
    with pytest.raises(UsageError, match=f"{variable} is 'yes'; expected 0 or 1"):
        get_runtime("ort").open(bundle.path, threads=1, native=True)
