from __future__ import annotations

import subprocess
import sys

import onnx_ir as ir
import pytest

from qsparse_export import ops
from qsparse_export.errors import UsageError


def model_with(*op_types: str, opset: int = ops.BODY_OPSET) -> ir.Model:
    nodes = [ir.node(name, [], domain=ops.DOMAIN) for name in op_types]
    return ir.Model(ir.Graph([], [], nodes=nodes, opset_imports={"": opset}), ir_version=11)


def test_importing_the_table_imports_neither_torch_nor_onnx():
    code = "import sys, qsparse_export.ops; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'onnx_ir')))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_every_entry_resolves_to_the_op_of_its_name():
    ops.register()
    for name in ops.OPS:
        entry = ops.op(name)
        assert entry.name == name
        assert entry.body().identifier() == (ops.DOMAIN, name, "")
        assert set(entry.body().attributes) == set(entry.schema().attributes)
        assert [i.name for i in entry.body().inputs] == [i.name for i in entry.schema().inputs]


def test_only_used_ops_get_a_body_and_twice_changes_nothing():
    model = model_with("TopKSparsify", "TopKSparsify")
    ops.attach_functions(model)
    ops.attach_functions(model)
    assert list(model.functions) == [(ops.DOMAIN, "TopKSparsify", "")]
    assert model.opset_imports[ops.DOMAIN] == ops.VERSION
    assert not ops.attach_functions(model_with()).functions


def test_ops_inside_subgraphs_are_found():
    branch = ir.Graph([], [], nodes=[ir.node("TernaryMatMul", [], domain=ops.DOMAIN)])
    node = ir.node("If", [], attributes={"then_branch": branch})
    model = ir.Model(ir.Graph([], [], nodes=[node], opset_imports={"": 23}), ir_version=11)
    assert [f.name for f in ops.functions(model)] == ["TernaryMatMul"]


def test_unknown_op_and_wrong_opset_are_refused():
    with pytest.raises(UsageError, match="no function body; did you mean TopKSparsify"):
        ops.attach_functions(model_with("TopKSparsifi"))
    with pytest.raises(UsageError, match="opset 22; the function bodies need 23"):
        ops.attach_functions(model_with("TopKSparsify", opset=22))
