"""How the matrices of a deployed decoder are stored: which ones as 4- or 8-bit groups, the others as the model has them."""

from __future__ import annotations

from dataclasses import dataclass

from qsparse_export.errors import UsageError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


@dataclass(frozen=True)
class GroupFormat:
    """Signed codes of ``bits`` bits; ``group`` consecutive inputs of one output share a float16 scale (``formats.nbits``)."""

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group < 1:
            raise UsageError(f"{self.bits} bits in groups of {self.group}; expected 4 or 8 bits and a positive group")


GROUP_FORMATS = {"int8": GroupFormat(8, 128), "int4": GroupFormat(4, 32)}
"""By the name that people choose; the groups are those of docs/adr/n-bit-groups-along-the-inputs.md."""


@dataclass(frozen=True)
class WeightFormats:
    """``linears``: those inside the blocks; ``head``: lm_head, or the embedding where it is the head too.

    None leaves matrices as the model has them: floating point, or ternary for BitNet. The router of a mixture of experts
    and an embedding of its own always stay in floating point.
    """

    linears: GroupFormat | None = None
    head: GroupFormat | None = None

    def of(self, name: str, tied_embeddings: bool) -> GroupFormat | None:
        """The format of the module called ``name`` (``model.layers.0.mlp.down_proj``)."""
        if name == (EMBEDDING if tied_embeddings else HEAD):
            return self.head
        return self.linears if name.rpartition(".")[2] in PROJECTIONS else None


AS_IN_THE_MODEL = WeightFormats()
