"""ONNX nodes -> Relax calls of our kernels: a converter per op, in the form that TVM's importer takes.

Between our ops activations stay rows [M, K]: a converter remembers the rows that a result was before it got its leading
dimensions back, and the next one takes those, so that no node reshapes at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from tvm import ir, relax, tirx
from tvm.relax.frontend.onnx.onnx_frontend import OnnxOpConverter

from qsparse_export.errors import ExportError
from qsparse_export.runtimes.tvm.kernels.cached_attention import cached_attention
from qsparse_export.runtimes.tvm.kernels.dense_matmul import dense_matmul
from qsparse_export.runtimes.tvm.kernels.dense_matmul_nbits import dense_matmul_nbits
from qsparse_export.runtimes.tvm.kernels.gated_activation import gated_activation
from qsparse_export.runtimes.tvm.kernels.gather_nbits import gather_nbits
from qsparse_export.runtimes.tvm.kernels.rms_norm import add_rms_norm, rms_norm
from qsparse_export.runtimes.tvm.kernels.sparse_matmul import sparse_matmul
from qsparse_export.runtimes.tvm.kernels.sparse_matmul_nbits import sparse_matmul_nbits
from qsparse_export.runtimes.tvm.kernels.sparse_ternary_matmul import sparse_ternary_matmul
from qsparse_export.runtimes.tvm.kernels.topk_sparsify import topk_sparsify
from qsparse_export.runtimes.tvm.lanes import Lanes
from qsparse_export.runtimes.tvm.tiling import Tilings

Attributes = dict[str, Any]
Converter = Callable[[relax.BlockBuilder, list[Any], Attributes], Any]
Otherwise = dict[str, type[OnnxOpConverter]]

_EPSILON = 1e-5  # of ONNX's RMSNormalization where the node says none


class Converters:
    """The converters of one import; ``otherwise`` are TVM's own, for what a kernel of ours does not take.

    ``tilings`` say how the work of a product is cut.
    """

    def __init__(self, lanes: Lanes, tilings: Tilings, otherwise: Otherwise, opset: int) -> None:
        self._lanes = lanes
        self._tilings = tilings
        self._otherwise = otherwise
        self._opset = opset
        self._rows: dict[Any, Any] = {}
        self._kernels: dict[tuple[Any, ...], Any] = {}
        self._caches: list[Any] = []

    def table(self) -> dict[str, type[OnnxOpConverter]]:
        """Op type to a converter class, TVM's own among them."""
        ours: dict[str, Converter] = {
            "AddRmsNorm": self._add_rms_norm,
            "CachedAttention": self._cached_attention,
            "DenseMatMulNBits": self._dense_matmul_nbits,
            "GatedActivation": self._gated_activation,
            "GatherNBits": self._gather_nbits,
            "SparseMatMul": self._sparse_matmul,
            "SparseMatMulNBits": self._sparse_matmul_nbits,
            "SparseTernaryMatMul": self._sparse_ternary_matmul,
            "TernaryMatMul": self._ternary_matmul,
            "TopKSparsify": self._topk_sparsify,
        }
        standard = {
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "RMSNormalization": self._rms_norm,
            "Reshape": self._reshape,
        }
        classes = {name: _converter_class(name, convert) for name, convert in ours.items()}
        classes |= {name: self._with_otherwise(name, convert) for name, convert in standard.items()}
        return {**self._otherwise, **classes}

    def _with_otherwise(self, name: str, convert: Converter) -> type[OnnxOpConverter]:
        """``convert`` where it gives a result, TVM's own converter where it gives None."""
        own = self._otherwise[name].get_converter(self._opset)

        def _impl(builder: Any, inputs: list[Any], attributes: Attributes, parameters: Any) -> Any:
            made = convert(builder, inputs, attributes)
            return own(builder, inputs, attributes, parameters) if made is None else made

        return type(name, (OnnxOpConverter,), {"_impl_v1": staticmethod(_impl)})

    def _kernel(self, builder: Any, make: Callable[..., tirx.PrimFunc], **static: Any) -> Any:
        """The kernel with these static values, made and added to the module once."""
        key = (make.__name__, *sorted(static.items()))
        if key not in self._kernels:
            private = make(self._lanes, **static).without_attr("global_symbol")  # the module names it
            self._kernels[key] = builder.add_func(private, make.__name__)
        return self._kernels[key]

    def _tiled(self, builder: Any, make: Callable[..., tirx.PrimFunc], inputs: list[Any], **static: Any) -> Any:
        """The same for a product, whose work is cut into tiles; ``inputs`` are x and the weights."""
        tiling = self._tilings.choose(make, static, int(_shape(inputs[1])[-1]))
        return self._kernel(builder, make, **static, tiling=tiling)

    def _as_rows(self, builder: Any, x: Any) -> Any:
        """``x`` [..., K] as [M, K]."""
        if x in self._rows:
            return self._rows[x]
        *lead, width = _shape(x)
        return x if len(lead) == 1 else builder.emit(relax.op.reshape(x, (_product(lead), width)))

    def _with_lead(self, builder: Any, rows: Any, lead: list[Any]) -> Any:
        """``rows`` [M, N] as [*lead, N], whose rows are remembered."""
        if len(lead) == 1:
            return rows
        result = builder.emit(relax.op.reshape(rows, (*lead, _shape(rows)[-1])))
        self._rows[result] = rows
        return result

    def _call(self, builder: Any, kernel: Any, arguments: list[Any], lead: list[Any], width: int) -> Any:
        """The float32 [*lead, width] that a kernel makes of rows."""
        out = relax.TensorType((_product(lead), width), "float32")
        return self._with_lead(builder, builder.emit(relax.op.call_tir(kernel, arguments, out)), lead)

    def _product_of(self, builder: Any, kernel: Any, inputs: list[Any], width: int) -> Any:
        x, *others = inputs
        return self._call(builder, kernel, [self._as_rows(builder, x), *others], _shape(x)[:-1], width)

    def _sparse_ternary_matmul(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        selection = _selection(inputs, attributes)
        kernel = self._tiled(builder, sparse_ternary_matmul, inputs, **selection, n=attributes["n"])
        return self._product_of(builder, kernel, inputs, sum(attributes["n"]))

    def _ternary_matmul(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        k_in, n = int(_shape(inputs[0])[-1]), attributes["n"]
        everything = {"k_in": k_in, "k": k_in, "block": 0, "rescale": "none"}
        kernel = self._tiled(builder, sparse_ternary_matmul, inputs, **everything, n=(n,))
        return self._product_of(builder, kernel, inputs, n)

    def _sparse_matmul_nbits(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        sizes = {name: attributes[name] for name in ("n", "bits", "group")}
        kernel = self._tiled(builder, sparse_matmul_nbits, inputs, **_selection(inputs, attributes), **sizes)
        return self._product_of(builder, kernel, inputs, sum(attributes["n"]))

    def _sparse_matmul(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        kernel = self._kernel(builder, sparse_matmul, **_selection(inputs, attributes), n=attributes["n"])
        return self._product_of(builder, kernel, inputs, sum(attributes["n"]))

    def _dense_matmul_nbits(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        sizes = {"k_in": attributes["k"], **{name: attributes[name] for name in ("n", "bits", "group")}}
        kernel = self._tiled(builder, dense_matmul_nbits, inputs, **sizes)
        return self._product_of(builder, kernel, inputs, attributes["n"])

    def _topk_sparsify(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        selection = _selection(inputs, attributes)
        kernel = self._kernel(builder, topk_sparsify, **selection)
        return self._product_of(builder, kernel, inputs, selection["k_in"])

    def _gated_activation(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        width = int(_shape(inputs[0])[-1]) // 2
        kernel = self._kernel(builder, gated_activation, n=width, activation=attributes["activation"].decode())
        return self._product_of(builder, kernel, inputs, width)

    def _gather_nbits(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        ids, w, scales = inputs
        sizes = {name: attributes[name] for name in ("k", "bits", "group")}
        kernel = self._kernel(builder, gather_nbits, n=int(_shape(w)[0]), **sizes)
        lead = _shape(ids)
        flat = ids if len(lead) == 1 else builder.emit(relax.op.reshape(ids, (_product(lead),)))
        return self._call(builder, kernel, [flat, w, scales], lead, attributes["k"])

    def _add_rms_norm(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        x, residual, weight = inputs
        *lead, width = _shape(x)
        kernel = self._kernel(builder, add_rms_norm, n=int(width), epsilon=attributes["epsilon"])
        out = relax.TensorType((_product(lead), width), "float32")
        arguments = [self._as_rows(builder, x), self._as_rows(builder, residual), weight]
        both = builder.emit(relax.op.call_tir(kernel, arguments, [out, out]))
        parts = (builder.emit(relax.TupleGetItem(both, i)) for i in range(2))
        return relax.Tuple([self._with_lead(builder, part, lead) for part in parts])

    def _rms_norm(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        x, _weight = inputs
        *lead, width = _shape(x)
        if attributes.get("axis", -1) not in (-1, len(lead)) or not (_is_float32(x) and isinstance(width, tirx.IntImm)):
            return None
        kernel = self._kernel(builder, rms_norm, n=int(width), epsilon=attributes.get("epsilon", _EPSILON))
        return self._product_of(builder, kernel, inputs, int(width))

    def _gemm(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        x, w, *bias = inputs
        if not _is_weight(w) or not _is_float32(x) or attributes.get("transA", 0):
            return None
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            return None
        if not attributes.get("transB", 0):
            product = self._matmul(builder, [x, w], {})
        else:
            n, k_in = (int(size) for size in _shape(w))
            kernel = self._kernel(builder, dense_matmul, k_in=k_in, n=n)
            product = self._product_of(builder, kernel, [x, w], n)
        return builder.emit(relax.op.add(product, bias[0])) if bias else product

    def _reshape(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        """A number that was a dimension becomes a list of one, which TVM's own converter takes from a tensor alone."""
        return relax.ShapeExpr([inputs[0]]) if isinstance(inputs[0].ty, ir.PrimType) else None

    def _matmul(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        x, w = inputs
        if not _is_weight(w) or not _is_float32(x) or len(_shape(x)) < 2:
            return None
        k_in, n = (int(size) for size in _shape(w))
        kernel = self._kernel(builder, sparse_matmul, k_in=k_in, n=(n,), k=k_in, block=0, rescale="none")
        return self._product_of(builder, kernel, inputs, n)

    def _cached_attention(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        qkv, cos, sin, visible, key, value = inputs
        for cache in (key, value):
            if cache in self._caches:
                raise ExportError(
                    "CachedAttention: one cache goes into two nodes, and each writes it; the runtime tvm wants a cache "
                    "per node: leave the pass fuse-attention out (--passes default,-fuse-attention)"
                )
            self._caches.append(cache)
        heads, kv_heads = attributes["heads"], attributes["kv_heads"]
        *lead, row = _shape(qkv)
        width = int(row) // (heads + 2 * kv_heads)
        kernel = self._kernel(builder, cached_attention, heads=heads, kv_heads=kv_heads, width=width)
        arguments = [self._as_rows(builder, qkv), cos, sin, visible, key, value]
        y = relax.TensorType((_product(lead), heads * width), "float32")
        call = relax.op.call_tir_inplace(kernel, arguments, [-1, 4, 5], [y, key.ty, value.ty])
        parts = [builder.emit(relax.TupleGetItem(builder.emit(call), i)) for i in range(3)]
        return relax.Tuple([self._with_lead(builder, parts[0], lead), *parts[1:]])


def _converter_class(name: str, convert: Converter) -> type[OnnxOpConverter]:
    def _impl(builder: Any, inputs: list[Any], attributes: Attributes, _parameters: Any) -> Any:
        return convert(builder, inputs, attributes)

    return type(name, (OnnxOpConverter,), {"_impl_v1": staticmethod(_impl)})


def _selection(inputs: list[Any], attributes: Attributes) -> dict[str, Any]:
    """The static values of the mask of a sparse product."""
    return {
        "k_in": int(_shape(inputs[0])[-1]),
        "k": attributes["k"],
        "block": attributes["block"],
        "rescale": attributes["rescale"].decode(),
    }


def _shape(x: Any) -> list[Any]:
    return list(x.ty.shape)


def _product(sizes: list[Any]) -> Any:
    return prod(sizes[1:], start=sizes[0]) if sizes else 1


def _is_weight(w: Any) -> bool:
    """Whether ``w`` is a float32 matrix of known size."""
    sizes = _shape(w)
    return _is_float32(w) and len(sizes) == 2 and all(isinstance(size, tirx.IntImm) for size in sizes)


def _is_float32(x: Any) -> bool:
    return str(x.ty.dtype) == "float32"
