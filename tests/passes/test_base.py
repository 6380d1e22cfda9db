"""The spelling of passes, and that every pass in the table keeps the contract."""

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_export.errors import UsageError
from qsparse_export.passes import PASSES
from qsparse_export.passes.base import Pass, parse_pipeline, pass_class
from qsparse_export.passes.clean_fold_constants import FoldConstants
from qsparse_export.passes.pipelines import DEFAULT


@pytest.mark.parametrize("name", PASSES)
def test_the_table_names_each_pass_and_each_shows_before_and_after(name):
    cls = pass_class(name)
    assert issubclass(cls, Pass) and cls.name == name
    assert ("Before:" in cls.__doc__ and "After:" in cls.__doc__) or name == "check"


@given(st.integers(0, 1 << 40), st.lists(st.sampled_from(sorted(set(PASSES) - {"fold-constants"})), max_size=5))
def test_parse_is_the_inverse_of_str(limit, names):
    passes = (FoldConstants(limit=limit), *(pass_class(name)() for name in names))
    assert parse_pipeline(",".join(map(str, passes))) == passes


def test_the_default_pipeline_round_trips():
    assert ",".join(map(str, parse_pipeline(DEFAULT))) == DEFAULT


def test_nothing_is_the_empty_pipeline():
    assert parse_pipeline("") == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fold-constant", "did you mean fold-constants"),
        ("fold-constants{size=3}", "unknown option"),
        ("fold-constants{limit=big}", "expected an integer"),
        ("fold-constants{limit=3", "expected name"),
        ("check,,check", "expected name"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(UsageError, match=message):
        parse_pipeline(spec)


def test_modified_is_exact_on_an_empty_graph():
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="empty"), ir_version=10)
    for step in parse_pipeline(DEFAULT):
        assert not step(model).modified, step
