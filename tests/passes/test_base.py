"""The spelling of passes, and that every pass in the table keeps the contract."""

import re
from dataclasses import fields

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_export.errors import UsageError
from qsparse_export.passes import PASSES
from qsparse_export.passes.base import Pass, described, parse_pipeline, pass_class
from qsparse_export.passes.clean_fold_constants import FoldConstants
from qsparse_export.passes.pipelines import DEFAULT


@pytest.mark.parametrize("name", PASSES)
def test_the_table_names_each_pass_and_each_shows_before_and_after(name):
    cls = pass_class(name)
    assert issubclass(cls, Pass) and cls.name == name
    assert ("Before:" in cls.__doc__ and re.search(r"After[^:]*:", cls.__doc__, re.DOTALL)) or name == "check"


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


DEFAULT_NAMES = [str(step) for step in parse_pipeline(DEFAULT)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("default", DEFAULT_NAMES),
        ("default,-check", [name for name in DEFAULT_NAMES if name != "check"]),
        ("a,b,c,+x@b", None),
        ("sort-nodes,check,+eliminate-dead@check", ["sort-nodes", "eliminate-dead", "check"]),
        ("check, +fold-constants{limit=7}@check", ["fold-constants{limit=7}", "check"]),
        ("check,default,-check,check", [*[name for name in DEFAULT_NAMES if name != "check"], "check"]),
    ],
)
def test_edits_of_the_default_pipeline(spec, expected):
    if expected is None:
        with pytest.raises(UsageError, match="unknown pass"):
            parse_pipeline(spec, DEFAULT)
    else:
        assert [str(step) for step in parse_pipeline(spec, DEFAULT)] == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("default,-fuse-topk", "there is no fuse-topk to take out; there is annotate-scope"),
        ("default,-nothing", "unknown pass"),
        ("-check{limit=3}", "takes every check out"),
        ("default,+check", "goes before a pass"),
        ("default,+check@fuse-topk", "goes before a pass"),
        ("check@sort-nodes", "expected \\+check@sort-nodes"),
        ("default{a=1}", "unknown pass 'default'"),
    ],
)
def test_mistakes_in_edits_are_named(spec, message):
    with pytest.raises(UsageError, match=message):
        parse_pipeline(spec, DEFAULT)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_is_described_with_its_options(name):
    text = described(name)
    assert text.splitlines()[0].endswith(".")
    for field in fields(pass_class(name)):
        assert f"{field.name}: {field.type} = " in text
