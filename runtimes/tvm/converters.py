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
from qsparse_export.runtimes.tvm.kernel_set import KernelSet

Attributes = dict[str, Any]
Converter = Callable[[relax.BlockBuilder, list[Any], Attributes], Any]
Otherwise = dict[str, type[OnnxOpConverter]]

_EPSILON = 1e-5  # of ONNX's RMSNormalization where the node says none


class Converters:
    """The converters of one import; ``otherwise`` are TVM's own, for what a kernel of ours does not take."""

    def __init__(self, kernels: KernelSet, otherwise: Otherwise, opset: int) -> None:
        self._kernels = kernels
        self._otherwise = otherwise
        self._opset = opset
        self._rows: dict[Any, Any] = {}
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
            "Gather": self._gather,
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

    def _call(
        self, builder: Any, name: str, arguments: list[Any], static: Attributes, lead: list[Any], width: int
    ) -> Any:
        """The float32 [*lead, width] that a kernel makes of rows."""
        out = relax.TensorType((_product(lead), width), "float32")
        return self._with_lead(builder, self._kernels.call(builder, name, arguments, static, [out])[0], lead)

    def _product_of(self, builder: Any, name: str, inputs: list[Any], static: Attributes, width: int) -> Any:
        x, *others = inputs
        return self._call(builder, name, [self._as_rows(builder, x), *others], static, _shape(x)[:-1], width)

    def _sparse_ternary_matmul(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        static = {**_selection(inputs, attributes), "n": attributes["n"]}
        return self._product_of(builder, "sparse_ternary_matmul", inputs, static, sum(attributes["n"]))

    def _ternary_matmul(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        k_in, n = int(_shape(inputs[0])[-1]), attributes["n"]
        static = {"k_in": k_in, "k": k_in, "block": 0, "rescale": "none", "n": (n,)}
        return self._product_of(builder, "sparse_ternary_matmul", inputs, static, n)

    def _sparse_matmul_nbits(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        static = {**_selection(inputs, attributes), **{name: attributes[name] for name in ("n", "bits", "group")}}
        return self._product_of(builder, "sparse_matmul_nbits", inputs, static, sum(attributes["n"]))

    def _sparse_matmul(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        static = {**_selection(inputs, attributes), "n": attributes["n"]}
        return self._product_of(builder, "sparse_matmul", inputs, static, sum(attributes["n"]))

    def _dense_matmul_nbits(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        static = {"k_in": attributes["k"], **{name: attributes[name] for name in ("n", "bits", "group")}}
        return self._product_of(builder, "dense_matmul_nbits", inputs, static, attributes["n"])

    def _topk_sparsify(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        static = _selection(inputs, attributes)
        return self._product_of(builder, "topk_sparsify", inputs, static, static["k_in"])

    def _gated_activation(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        width = int(_shape(inputs[0])[-1]) // 2
        static = {"n": width, "activation": attributes["activation"].decode()}
        return self._product_of(builder, "gated_activation", inputs, static, width)

    def _gather_nbits(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        ids, w, scales = inputs
        static = {"n": int(_shape(w)[0]), **{name: attributes[name] for name in ("k", "bits", "group")}}
        lead = _shape(ids)
        flat = ids if len(lead) == 1 else builder.emit(relax.op.reshape(ids, (_product(lead),)))
        return self._call(builder, "gather_nbits", [flat, w, scales], static, lead, attributes["k"])

    def _add_rms_norm(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        x, residual, weight = inputs
        *lead, width = _shape(x)
        out = relax.TensorType((_product(lead), width), "float32")
        arguments = [self._as_rows(builder, x), self._as_rows(builder, residual), weight]
        static = {"n": int(width), "epsilon": attributes["epsilon"]}
        parts = self._kernels.call(builder, "add_rms_norm", arguments, static, [out, out])
        return relax.Tuple([self._with_lead(builder, part, lead) for part in parts])

    def _rms_norm(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        x, _weight = inputs
        *lead, width = _shape(x)
        if attributes.get("axis", -1) not in (-1, len(lead)) or not (_is_float32(x) and isinstance(width, tirx.IntImm)):
            return None
        static = {"n": int(width), "epsilon": attributes.get("epsilon", _EPSILON)}
        return self._product_of(builder, "rms_norm", inputs, static, int(width))

    def _gather(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        """Rows of a matrix. TVM's own converter reads their number from a tensor at run time, in the memory of the CPU."""
        w, ids = inputs
        if not _is_weight(w) or attributes.get("axis", 0) != 0 or isinstance(ids.ty, ir.PrimType):
            return None
        zero, rows = (relax.const(number, str(ids.ty.dtype)) for number in (0, int(_shape(w)[0])))
        from_end = builder.emit(relax.op.less(ids, zero))
        taken = builder.emit(relax.op.where(from_end, builder.emit(relax.op.add(ids, rows)), ids))
        return builder.emit(relax.op.take(w, taken, axis=0, mode="fast"))

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
            product = self._product_of(builder, "dense_matmul", [x, w], {"k_in": k_in, "n": n}, n)
        return builder.emit(relax.op.add(product, bias[0])) if bias else product

    def _reshape(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        """A number that was a dimension becomes a list of one, which TVM's own converter takes from a tensor alone."""
        return relax.ShapeExpr([inputs[0]]) if isinstance(inputs[0].ty, ir.PrimType) else None

    def _matmul(self, builder: Any, inputs: list[Any], attributes: Attributes) -> Any:
        x, w = inputs
        if not _is_weight(w) or not _is_float32(x) or len(_shape(x)) < 2:
            return None
        k_in, n = (int(size) for size in _shape(w))
        static = {"k_in": k_in, "n": (n,), "k": k_in, "block": 0, "rescale": "none"}
        return self._product_of(builder, "sparse_matmul", inputs, static, n)

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
        static = {"heads": heads, "kv_heads": kv_heads, "width": width}
        arguments = [self._as_rows(builder, qkv), cos, sin, visible, key, value]
        y = relax.TensorType((_product(lead), heads * width), "float32")
        parts = self._kernels.call(builder, "cached_attention", arguments, static, [y, 4, 5])
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
