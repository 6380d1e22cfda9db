"""A source of weights that quantises on the way: the matrices that a format asks for come as n-bit groups."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qsparse_export.errors import CheckpointError
from qsparse_export.nn.group_quantizer import group_codes, group_scales
from qsparse_export.weight_formats import GroupFormat, WeightFormats
from qsparse_export.weights import GroupWeight, TernaryWeight, WeightSource


class QuantizedSource:
    """``source`` with the matrices of ``formats`` quantised, each time that one is read; all others as they are.

    Finding scales takes most of the time, so they are kept (an eighth of the size of 4-bit codes, 1/64 of 8-bit ones),
    and codes are made from them again. ``relative_errors``: of each matrix that was read, by the name of its tensor, the L2
    norm of what quantising lost over that of the matrix.
    """

    def __init__(self, source: WeightSource, formats: WeightFormats, tied_embeddings: bool) -> None:
        self._source = source
        self._formats = formats
        self._tied_embeddings = tied_embeddings
        self._scales: dict[str, torch.Tensor] = {}
        self.relative_errors: dict[str, float] = {}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to logical shape, as in ``source``."""
        return self._source.shapes

    def format_of(self, name: str) -> GroupFormat | None:
        """How the tensor ``name`` is quantised."""
        owner, _, leaf = name.rpartition(".")
        return self._formats.of(owner, self._tied_embeddings) if leaf == "weight" else None

    def read(self, name: str) -> torch.Tensor | TernaryWeight | GroupWeight:
        """See :class:`WeightSource`; CheckpointError also for a matrix that float16 scales cannot hold."""
        chosen = self.format_of(name)
        if chosen is None:
            return self._source.read(name)
        if name in self._scales:
            scales = self._scales[name]
            return GroupWeight(scales, lambda: group_codes(self._floating(name), scales, chosen), chosen)
        weight = self._floating(name)
        scales, error = group_scales(name, weight, chosen)
        self._scales[name], self.relative_errors[name] = scales, error
        # The weight is at hand as long as the result is: a checkpoint may take longer to read than to quantise.
        return GroupWeight(scales, lambda: group_codes(weight, scales, chosen), chosen)

    def _floating(self, name: str) -> torch.Tensor:
        stored = self._source.read(name)
        if not isinstance(stored, torch.Tensor):
            raise CheckpointError(
                f"tensor {name} is quantised already ({type(stored).__name__}), and quantising it again would only lose more: "
                "leave it as it is with --weights keep"
            )
        return stored
