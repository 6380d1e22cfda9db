"""The original of a fused graph, following the fused one's discrete choices as PyTorch does in :mod:`~qsparse_export.guided`.

A top-k mask and an int8 rounding are discontinuous, so two correct implementations now and then choose otherwise. Here the
judge is not PyTorch but the original file, run by ONNX Runtime: its masks and integers are replaced by those of the fused
model, and what it would have chosen from comes out beside its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.errors import ParityError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qsparse_export.passes.original_choices import Choice

_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Followed:
    """One choice of the fused model; ``guide`` is the input that imposes it on the original.

    The others are outputs: ``seen`` what it was chosen from (magnitudes, or what is rounded), ``free`` what the original
    itself makes of that (a masked row, integers), ``kept`` what its mask is applied to.
    """

    choice: Choice
    guide: str
    seen: str
    free: str
    kept: str


class Original:
    """ONNX Runtime sessions on the file at ``path``: as it is, and following choices."""

    def __init__(self, path: Path, choices: Sequence[Choice]) -> None:
        self._path = path
        self.followed, self._guided = _followable(path, choices)
        self._sessions: dict[bool, Any] = {}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of the file itself. ParityError when ONNX Runtime refuses the file or the inputs."""
        return _run(_session(str(self._path), self._path.parent), feeds)

    def follow(
        self, feeds: Mapping[str, np.ndarray], guides: Sequence[np.ndarray], *, optimise: bool
    ) -> dict[str, Any]:
        """Outputs, and the values of each :class:`Followed`, when the choices are ``guides``, in the order of ``followed``."""
        given = {entry.guide: guide for entry, guide in zip(self.followed, guides, strict=True)}
        if optimise not in self._sessions:
            self._sessions[optimise] = _session(self._guided, self._path.parent, optimise=optimise)
        return _run(self._sessions[optimise], {**feeds, **given})


def _session(model: str | bytes, folder: Path, *, optimise: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if isinstance(model, bytes):
        options.add_session_config_entry(_FOLDER, str(folder))
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class per status code, without a common base of their own
        raise ParityError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the original, so there is nothing to compare with ({error}); "
            "export it with --verify none"
        ) from error


def _run(session: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:  # as above
        raise ParityError(
            f"the original does not run on the example inputs ({error}); give inputs that it takes with --inputs FILE.npz"
        ) from error


def _followable(path: Path, choices: Sequence[Choice]) -> tuple[tuple[Followed, ...], bytes]:
    """The original with one more input and output per choice; choices whose values it does not name are left to itself."""
    import onnx_ir as ir

    from qsparse_export.passes.original_choices import MaskChoice

    model = ir.load(path)
    graph = model.graph
    named = {value.name: value for node in graph for value in node.outputs}
    named |= {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    twins = _twins(graph)
    followed = []
    for number, choice in enumerate(choices):
        kept_or_q, seen = (choice.kept, choice.x) if isinstance(choice, MaskChoice) else (choice.q, choice.scaled)
        replaced = choice.masked if isinstance(choice, MaskChoice) else (choice.q,)
        if any(name not in named for name in (kept_or_q, seen, *replaced)):
            continue
        entry = Followed(choice, *(f"qsparse.{part}.{number}" for part in ("guide", "seen", "free", "kept")))
        is_mask = isinstance(choice, MaskChoice)
        guide = ir.Value(
            name=entry.guide, type=ir.TensorType(ir.DataType.BOOL if is_mask else ir.DataType.FLOAT), shape=None
        )
        graph.inputs.append(guide)
        for name, output in ((seen, entry.seen), (replaced[0], entry.free), (kept_or_q, entry.kept)):
            look = ir.node("Identity", [named[name]])
            look.outputs[0].name = output
            graph.append(look)
            graph.outputs.append(look.outputs[0])
        for value in {twin for name in replaced for twin in twins[named[name]]}:
            kept = named[kept_or_q] if is_mask else value
            _put(graph, value, kept, guide, is_mask=is_mask, only_kept=is_mask or bool(choice.masked))
        followed.append(entry)
    graph.sort()
    return tuple(followed), ir.to_proto(model).SerializeToString()


def _put(graph: ir.Graph, old: ir.Value, kept: ir.Value, guide: ir.Value, *, is_mask: bool, only_kept: bool) -> None:
    """Whatever read ``old`` reads the guide: a mask on ``kept``, or integers (where ``only_kept``, those that are not 0)."""
    import onnx_ir as ir

    readers = [use for use in old.uses() if use.node.graph is not graph or use.node.outputs[0].name is None
               or not str(use.node.outputs[0].name).startswith("qsparse.")]  # fmt: skip
    zero = ir.node("Constant", [], attributes={"value": ir.tensor(np.zeros((), np.float32))})
    shape = ir.node("Shape", [old])
    shaped = ir.node("Reshape", [guide, shape.outputs[0]])  # a row here may be blocks there
    choice = shaped.outputs[0]
    typed = ir.node("CastLike", [zero.outputs[0] if is_mask else choice, old])
    nodes = [zero, shape, shaped, typed]
    if is_mask:
        nodes.append(ir.node("Where", [choice, kept, typed.outputs[0]]))
    elif only_kept:
        dropped = ir.node("Equal", [choice, zero.outputs[0]])
        nodes += [dropped, ir.node("Where", [dropped.outputs[0], old, typed.outputs[0]])]
    for node in nodes:
        graph.append(node)
    for use in readers:
        use.node.replace_input_with(use.idx, nodes[-1].outputs[0])


def _twins(graph: ir.Graph) -> dict[ir.Value, list[ir.Value]]:
    """For every value of ``graph`` those that are computed alike: what one fused node stands for may be written twice."""
    numbers: dict[Any, int] = {}
    number_of: dict[ir.Value, int] = {}
    alike: dict[int, list[ir.Value]] = {}

    def note(value: ir.Value, key: Any) -> None:
        number_of[value] = numbers.setdefault(key, len(numbers))
        alike.setdefault(number_of[value], []).append(value)

    for value in (*graph.inputs, *graph.initializers.values()):
        tensor = value.const_value
        small = tensor is not None and tensor.size <= 16 and tensor.dtype.name != "STRING"
        note(
            value, (tensor.dtype, tuple(tensor.shape), tensor.tobytes()) if small and tensor is not None else id(value)
        )
    for node in graph:
        inputs = tuple(None if value is None else number_of.get(value, -1 - id(value)) for value in node.inputs)
        attributes = tuple(sorted((name, _attribute_key(a)) for name, a in node.attributes.items()))
        for position, output in enumerate(node.outputs):
            source = node.inputs[0] if node.inputs else None
            if node.domain == "" and node.op_type == "Identity" and source in number_of:
                number_of[output] = number_of[source]
                alike[number_of[source]].append(output)
            else:
                note(output, (node.domain, node.op_type, inputs, attributes, position))
    return {value: alike[number] for value, number in number_of.items()}


def _attribute_key(attribute: ir.Attr) -> str:
    if attribute.type.name == "TENSOR":
        tensor = attribute.as_tensor()
        if tensor.size <= 16 and tensor.dtype.name != "STRING":
            return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.tobytes()!r}"
        return str(id(attribute))
    return f"{attribute.value}" if attribute.type.name not in ("GRAPH", "GRAPHS") else str(id(attribute))
