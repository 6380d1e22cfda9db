"""The contract of a pass and its spelling: a pass is a frozen dataclass, its fields are its options."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qsparse_export.errors import UsageError, near_names
from qsparse_export.passes import PASSES

__all__ = ["Pass", "PassResult", "parse_pipeline", "run_pipeline", "weights_unread"]

_SPEC = re.compile(r"([a-z0-9-]+)(?:\{([^{}]*)\})?")


@dataclass(frozen=True)
class Pass(InPlacePass):
    """Rewrites a model in place; ``call`` returns whether it changed anything, exactly."""

    name: ClassVar[str]

    def call(self, model: ir.Model) -> PassResult:
        """Rewrites ``model`` and says in ``modified`` whether it did."""
        raise NotImplementedError(f"{type(self).__name__}.call")

    def __str__(self) -> str:
        """The spec string, which parses back to an equal pass: ``fold-constants{limit=1024}``."""
        options = [f"{f.name}={_spell(getattr(self, f.name))}" for f in fields(self) if _differs(self, f)]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


def _differs(value: Pass, field: Field) -> bool:
    return field.default is MISSING or getattr(value, field.name) != field.default


def _spell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_pipeline(spec: str) -> tuple[Pass, ...]:
    """``"eliminate-dead,fold-constants{limit=1024}"`` to passes; UsageError names what is unknown, with near names."""
    passes, at = [], 0
    spec = spec.replace(" ", "")
    while at < len(spec):
        match = _SPEC.match(spec, at)
        if not match or (match.end() < len(spec) and spec[match.end()] != ","):
            raise UsageError(f"pipeline {spec!r}: expected name or name{{option=value,...}} at character {at}")
        passes.append(_make(match[1], match[2] or ""))
        at = match.end() + 1
    return tuple(passes)


def pass_class(name: str) -> type[Pass]:
    """The class of the pass called ``name``; UsageError with near names when there is none."""
    if name not in PASSES:
        raise UsageError(f"unknown pass {name!r}; {near_names(name, PASSES)}")
    module, _, cls = PASSES[name].partition(":")
    return getattr(importlib.import_module(f"qsparse_export.passes.{module}"), cls)


def _make(name: str, options: str) -> Pass:
    cls = pass_class(name)
    known = {field.name: field for field in fields(cls)}
    values: dict[str, object] = {}
    for option in filter(None, options.split(",")):
        key, equals, text = option.partition("=")
        if not equals or key not in known:
            raise UsageError(f"pass {name}: unknown option {option!r}; {near_names(key, known)}")
        values[key] = _value(name, known[key], text)
    return cls(**values)


def _value(name: str, field: Field, text: str) -> object:
    if field.type == "bool":
        if text not in ("true", "false"):
            raise UsageError(f"pass {name}: {field.name}={text}; expected true or false")
        return text == "true"
    if field.type == "int":
        if not re.fullmatch(r"-?\d+", text):
            raise UsageError(f"pass {name}: {field.name}={text}; expected an integer")
        return int(text)
    return text


def run_pipeline(model: ir.Model, pipeline: tuple[Pass, ...]) -> bool:
    """Runs the passes in order on ``model``; True when any of them changed it."""
    modified = False
    for step in pipeline:
        modified |= step(model).modified
    return modified


@contextlib.contextmanager
def weights_unread(model: ir.Model) -> Iterator[None]:
    """Inside, lazy initialisers have no value: onnx's own functions would read the small ones, each a whole matrix of the
    checkpoint, and hide what is wrong with it in an error of theirs."""
    lazy = [value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.LazyTensor)]
    values = [value.const_value for value in lazy]
    for value in lazy:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in zip(lazy, values, strict=True):
            value.const_value = tensor
