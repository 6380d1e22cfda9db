"""What ONNX Runtime refuses to run is an error of ours."""

import numpy as np
import pytest
import torch

import qsparse_export as qs
from qsparse_export.errors import BundleError
from qsparse_export.runtimes import get_runtime


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    table, ids = torch.nn.Embedding(5, 3), torch.zeros((2, 4), dtype=torch.int64)
    out = tmp_path_factory.mktemp("bundles") / "table"
    bundle = qs.export(table, example_inputs=(ids,), verify="none", out=out)
    return get_runtime("ort").open(bundle.path, threads=1, native=False)


@pytest.mark.parametrize(
    ("fed", "reason"),
    [
        (np.zeros((2, 4), np.float32), "Unexpected input data type"),
        (np.full((2, 4), 5), "out of data bounds"),
        (np.array([["a"] * 4] * 2), "."),
    ],
)
def test_what_cannot_be_run(session, fed, reason):
    (name,), (result,) = session.input_names, session.output_names
    for results in (None, {result: session.to_tensor(np.zeros((2, 4, 3), np.float32))}):
        with pytest.raises(
            BundleError, match=rf"(?s)ONNX Runtime \S+ cannot run the graph: .*{reason}.*; feed what its inputs say"
        ):
            session.run({name: fed}, results)
    assert session.to_numpy(session.run({name: np.zeros((2, 4), np.int64)})[result]).shape == (2, 4, 3)


def test_what_is_no_tensor(session):
    with pytest.raises(BundleError, match="cannot run the graph"):
        session.to_tensor(np.array([object()]))
