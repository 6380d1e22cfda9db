"""Where a graph that was fused made its discrete choices before, by the names of its values: kept beside the fused nodes.

Verification lets the original file follow the fused one's masks and roundings; it finds them in the original by these names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import onnx_ir as ir

ORIGINAL = "ai.qsparse.original"
"""Key of a node's metadata: a JSON list with one entry for each op that the node stands for, in their order."""

ROWS = "ai.qsparse.rows"
"""Key of a node's metadata: the bool value [tokens, 1] of the graph that is true in the rows which the node had alone before."""
UNFOLLOWED = "ai.qsparse.unfollowed"
"""Key of a node's metadata: the op stands for standard ones, whose choice nobody follows."""


@dataclass(frozen=True)
class MaskChoice:
    """``masked`` are the values that were ``kept`` (mostly x itself) with all but the top k of ``x`` in each row set to 0."""

    x: str
    kept: str
    masked: tuple[str, ...]


@dataclass(frozen=True)
class RoundingChoice:
    """``q`` was ``scaled`` rounded to integers -128..127; ``masked`` when the mask of the row came after that."""

    scaled: str
    q: str
    masked: bool = False


Choice = MaskChoice | RoundingChoice


def add_choice(node: ir.Node, choice: Choice) -> None:
    """Notes ``choice`` at ``node``."""
    join_choices(node, [choice])


def join_choices(node: ir.Node, choices: list[Choice]) -> None:
    """Notes ``choices`` at ``node``, behind those that are noted there."""
    plain = [asdict(choice) for choice in (*choices_of(node), *choices)]
    if plain:
        node.metadata_props[ORIGINAL] = json.dumps(plain)


def choices_of(node: ir.Node) -> list[Choice]:
    """What is noted at ``node``."""
    entries = json.loads(node.metadata_props.get(ORIGINAL, "[]"))
    return [
        MaskChoice(**entry | {"masked": tuple(entry["masked"])}) if "x" in entry else RoundingChoice(**entry)
        for entry in entries
    ]
