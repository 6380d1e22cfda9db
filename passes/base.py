"""The contract of a pass and its spelling: a pass is a frozen dataclass, its fields are its options."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qsparse_export.errors import UsageError, near_names
from qsparse_export.passes import PASSES

__all__ = ["OnPass", "Pass", "PassResult", "parse_pipeline", "run_pipeline", "weights_unread"]

_SPEC = re.compile(
    r"(?P<sign>[+-]?)(?P<name>[a-z0-9][a-z0-9-]*)(?:\{(?P<options>[^{}]*)\})?(?:@(?P<before>[a-z0-9-]+))?"
)


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


def parse_pipeline(spec: str, default: str = "") -> tuple[Pass, ...]:
    """``"eliminate-dead,fold-constants{limit=1024}"`` to passes; UsageError names what is unknown, with near names.

    ``default`` among them stands for that whole pipeline, and what follows edits what stands before it: ``-NAME`` takes
    every pass of that name out, ``+NAME{...}@OTHER`` puts one before the first OTHER. ``default,-fuse-topk,+check@fuse-ternary``.
    """
    passes: list[Pass] = []
    for sign, name, options, before in _items(spec):
        if sign == "-":
            if options or before:
                raise UsageError(f"pipeline {spec!r}: -{name} takes every {name} out, whatever its options")
            pass_class(name)
            left = [step for step in passes if step.name != name]
            if len(left) == len(passes):
                raise UsageError(f"pipeline {spec!r}: there is no {name} to take out; there is {_names(passes)}")
            passes = left
        elif sign == "+":
            at = next((i for i, step in enumerate(passes) if step.name == before), None)
            if at is None:
                raise UsageError(f"pipeline {spec!r}: +{name} goes before a pass (+{name}@PASS) of {_names(passes)}")
            passes.insert(at, _make(name, options))
        elif before:
            raise UsageError(f"pipeline {spec!r}: {name}@{before}; expected +{name}@{before}")
        elif name == "default" and not options:
            passes.extend(parse_pipeline(default))
        else:
            passes.append(_make(name, options))
    return tuple(passes)


def _items(spec: str) -> Iterator[tuple[str, str, str, str]]:
    """Sign, name, options and the pass after the @, of each item."""
    spec, at = spec.replace(" ", ""), 0
    while at < len(spec):
        match = _SPEC.match(spec, at)
        if not match or (match.end() < len(spec) and spec[match.end()] != ","):
            raise UsageError(
                f"pipeline {spec!r}: expected name, name{{option=value,...}}, default, -name or +name@other at character {at}"
            )
        yield match["sign"], match["name"], match["options"] or "", match["before"] or ""
        at = match.end() + 1


def _names(passes: Sequence[Pass]) -> str:
    return ", ".join(dict.fromkeys(step.name for step in passes)) or "none so far"


def pass_class(name: str) -> type[Pass]:
    """The class of the pass called ``name``; UsageError with near names when there is none."""
    if name not in PASSES:
        raise UsageError(f"unknown pass {name!r}; {near_names(name, PASSES)}")
    module, _, cls = PASSES[name].partition(":")
    return getattr(importlib.import_module(f"qsparse_export.passes.{module}"), cls)


def described(name: str) -> str:
    """What the pass called ``name`` does, its options with their defaults, and its Before and After."""
    cls = pass_class(name)
    options = [f"{f.name}: {f.type} = {_spell(f.default)}" for f in fields(cls)]
    text = inspect.cleandoc(cls.__doc__ or "")
    return text + (f"\n\nOptions: {', '.join(options)}" if options else "")


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


OnPass = Callable[[int, Pass, ir.Model], None]
"""Is shown the number of a pass in its pipeline (from 1), the pass, and the graph after it, which it must not change."""


def run_pipeline(model: ir.Model, pipeline: tuple[Pass, ...], on_pass: OnPass | None = None) -> bool:
    """Runs the passes in order on ``model``; True when any of them changed it."""
    modified = False
    for number, step in enumerate(pipeline, 1):
        modified |= step(model).modified
        if on_pass is not None:
            on_pass(number, step, model)
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
