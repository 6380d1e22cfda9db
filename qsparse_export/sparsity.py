"""What a user asks for with ``--sparse-ratio``: text or TOML to rules, and their meeting with the checkpoint's own.

Grammar of one item: ``[NAME=]RATIO[:block=B][:rescale=l2]``, or the path of a ``.toml`` file. RATIO is the share of
zeros. NAME is a projection (``q k v qkv o gate up gate_up down``) or an ``fnmatch`` pattern of module names; without
NAME the item holds for every projection of every block. The last item that matches a linear wins.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsparse_export.config import ModelConfig, SparsityRule, TopK, topk_of
from qsparse_export.errors import CheckpointError, UsageError, near_names

EVERY_PROJECTION = "*_proj"
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate": ("gate",),
    "up": ("up",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
_MOST_TOML_BYTES = 1 << 20


def parse_sparsity(items: Iterable[str]) -> tuple[SparsityRule, ...]:
    """Rules in the order given. Raises UsageError for an unreadable item, an unknown name or a ratio outside 0..1."""
    rules: list[SparsityRule] = []
    for item in items:
        if item.endswith(".toml"):
            rules += read_sparsity_toml(Path(item))
        else:
            rules += _parse_item(item)
    return tuple(rules)


def read_sparsity_toml(path: Path) -> tuple[SparsityRule, ...]:
    """Rules of a TOML file: ``NAME = ratio`` or ``NAME = {sparse_ratio = .., block = .., rescale = ".."}``, in order."""
    try:
        text = path.read_bytes()[: _MOST_TOML_BYTES + 1]
        if len(text) > _MOST_TOML_BYTES:
            raise UsageError(f"{path} is larger than {_MOST_TOML_BYTES} bytes; expected a short TOML table of ratios")
        table = tomllib.loads(text.decode())
    except OSError as error:
        raise UsageError(f"the sparsity file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the sparsity file {path} is not valid TOML: {error}") from error
    rules: list[SparsityRule] = []
    for name, value in table.items():
        rules += projection_rules(name, _topk_of_value(value, f"{path}: {name}"))
    return tuple(rules)


def rules_of_mapping(mapping: Mapping[str, Any], source: str) -> tuple[SparsityRule, ...]:
    """Rules of a checkpoint's per-projection mapping, as in config.json; CheckpointError when it is malformed."""
    rules: list[SparsityRule] = []
    try:
        for name, value in mapping.items():
            rules += projection_rules(name, _topk_of_value(value, f"{source}: {name}"))
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    return tuple(rules)


def projection_rules(name: str, topk: TopK) -> tuple[SparsityRule, ...]:
    """Rules for one NAME of the grammar (``down``, ``down_proj``, ``qkv``, ``*``, ``model.layers.0.*``)."""
    if any(character in name for character in "*?[."):
        return (SparsityRule(name, topk),)
    projections = PROJECTIONS.get(name.removesuffix("_proj"))
    if projections is None:
        raise UsageError(
            f"no projection is called {name!r}; {near_names(name, PROJECTIONS)}; "
            "or give a pattern of module names, such as 'model.layers.0.*'"
        )
    return tuple(SparsityRule(f"*.{projection}_proj", topk) for projection in projections)


def rule_text(rule: SparsityRule) -> str:
    """The item of the grammar that stands for ``rule``; ``parse_sparsity([rule_text(r)]) == (r,)``."""
    block = f":block={rule.topk.block}" if rule.topk.block else ""
    rescale = f":rescale={rule.topk.rescale}" if rule.topk.rescale != "none" else ""
    return f"{rule.pattern}={rule.topk.sparse_ratio!r}{block}{rescale}"


def with_sparsity(
    config: ModelConfig,
    rules: Sequence[SparsityRule] | None,
    linears: Mapping[str, tuple[int, int]],
    *,
    override: bool,
) -> ModelConfig:
    """``config`` with ``rules`` laid over its own, where ``linears`` gives (N, K) of every linear that may be sparse.

    Raises UsageError when a rule matches no linear, or when the rules change a mask that the checkpoint was trained
    with and ``override`` is not set. Equal masks (same k, block, rescale) are no contradiction.
    """
    if not rules:
        return config
    for rule in rules:
        if not any(fnmatch.fnmatchcase(name, rule.pattern) for name in linears):
            raise UsageError(
                f"the sparsity pattern {rule.pattern!r} matches no linear of this model; its linears are called like "
                f"{', '.join(list(linears)[:7])}"
            )
    asked = replace(config, sparsity=(*config.sparsity, *rules))
    trained_sparse = any(not topk_of(config.sparsity, name).is_dense for name in linears)
    if trained_sparse and not override:
        for name, (_, width) in linears.items():
            trained, wanted = topk_of(config.sparsity, name), topk_of(asked.sparsity, name)
            if _mask(trained, width) != _mask(wanted, width):
                raise UsageError(
                    f"the checkpoint was trained with {_describe(trained)} at {name}, and {_describe(wanted)} was asked "
                    "for: leave --sparse-ratio out to keep the checkpoint's own, or pass --override to replace it"
                )
    return asked


def _parse_item(item: str) -> tuple[SparsityRule, ...]:
    head, *options = item.split(":")
    name, separator, ratio = head.rpartition("=")
    fields: dict[str, Any] = {}
    try:
        fields["sparse_ratio"] = float(ratio)
        for option in options:
            key, _, value = option.partition("=")
            fields[key] = int(value) if key == "block" else value
    except ValueError as error:
        raise UsageError(
            f"--sparse-ratio {item!r} is not understood; expected [NAME=]RATIO[:block=B][:rescale=l2], "
            "such as 0.25 or down=0.5, or a .toml file"
        ) from error
    topk = _topk_of_value(fields, f"--sparse-ratio {item}")
    return projection_rules(name, topk) if separator else (SparsityRule(EVERY_PROJECTION, topk),)


def _topk_of_value(value: object, source: str) -> TopK:
    """A TopK from a number or a table of its fields; UsageError that begins with ``source`` otherwise."""
    fields = value if isinstance(value, dict) else {"sparse_ratio": value}
    unknown = [key for key in fields if key not in ("sparse_ratio", "block", "rescale")]
    if unknown:
        raise UsageError(
            f"{source}: unknown {unknown[0]!r}; {near_names(unknown[0], ('sparse_ratio', 'block', 'rescale'))}"
        )
    ratio, block, rescale = fields.get("sparse_ratio"), fields.get("block", 0), fields.get("rescale", "none")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 <= ratio <= 1.0:
        raise UsageError(f"{source}: the ratio is {ratio!r}; expected a share of zeros from 0 (dense) to 1")
    if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < 2**31:
        raise UsageError(f"{source}: block is {block!r}; expected 0 (the whole row) or a number of channels")
    if rescale not in ("none", "l2"):
        raise UsageError(f"{source}: rescale is {rescale!r}; expected 'none' or 'l2'")
    return TopK(float(ratio), block, rescale)


def _mask(topk: TopK, width: int) -> tuple[int, int, str]:
    """What decides the mask of a row of ``width`` channels: k, block and rescale; every dense mask is the same one."""
    k = topk.k(width)
    if k >= (topk.block or width):
        return width, 0, topk.rescale
    return k, topk.block, topk.rescale


def _describe(topk: TopK) -> str:
    block = f" in blocks of {topk.block}" if topk.block else ""
    rescale = " and l2 rescaling" if topk.rescale != "none" else ""
    return f"sparse_ratio {max(topk.sparse_ratio, 0.0):g}{block}{rescale}"
