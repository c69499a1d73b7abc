"""How quantized weights lie in an ONNX graph: the operators that read them, their initializers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.formats import FORMATS, QTensor, group
from qgraph.formats.packing import pack_bits, unpack_bits

Arrays = dict[str, npt.NDArray]


@dataclass(frozen=True)
class WeightForm:
    """The ONNX form of one weight format.

    Attributes:
        format: a key of FORMATS.
        code_type: the element type of codes and zero points.
        code_bits: that such an element takes. ONNX has no 3-bit type.
        opset: the first that has the type.
    """

    format: str
    code_type: ir.DataType
    code_bits: int
    opset: int

    @property
    def linear(self) -> str:
        """The operator (x, *parts) -> x @ W."""
        return f"QLinear{FORMATS[self.format].title}"

    @property
    def lookup(self) -> str:
        """The operator (ids, *parts) -> rows of a table, for the format of tables (`TABLES`)."""
        return f"QGather{FORMATS[self.format].title}"

    @property
    def columns(self) -> str:
        """The operator (ids, *parts) -> columns of W, for a table that is tied to a linear layer."""
        return f"QGatherColumns{FORMATS[self.format].title}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The operator's inputs after the first: codes, scales and offsets, in order."""
        spec = FORMATS[self.format]
        return (
            "codes",
            "block_scale",
            *(("global_scale",) if spec.has_global_scale else ()),
            *(() if spec.offset == "none" else (spec.offset,)),
        )

    def nbytes(self, K: int, N: int) -> int:
        """Bytes of the initializers of a [K, N] weight."""
        spec = FORMATS[self.format]
        extra = -(-K * N * self.code_bits // 8) - -(-K * N * spec.code_bits // 8)
        if spec.offset == "zero_point":
            blocks = spec.blocks(K) * N
            extra += -(-blocks * self.code_bits // 8) - -(-blocks * spec.code_bits // 8)
        return spec.nbytes(K, N) + extra


_INT = ir.DataType

FORMS: dict[str, WeightForm] = {
    form.format: form
    for form in (
        WeightForm("nvfp4", _INT.FLOAT4E2M1, 4, 23),
        WeightForm("ternary", _INT.INT2, 2, 25),
        WeightForm("int2", _INT.UINT2, 2, 25),
        WeightForm("int3", _INT.UINT4, 4, 23),
        WeightForm("int4", _INT.UINT4, 4, 23),
        WeightForm("int4-sym", _INT.INT4, 4, 23),
        WeightForm("int8", _INT.INT8, 8, 23),
    )
}

TABLES = "nvfp4"  # the format, and the name of a scheme, of every table that is quantized
# Operators -> what they read.
LINEARS = {form.linear: form for form in FORMS.values()}
LOOKUPS = {FORMS[TABLES].lookup: FORMS[TABLES]}
COLUMNS = {form.columns: form for form in FORMS.values()}
OF_LAYERS = LINEARS | COLUMNS  # all that read the weight of a linear layer


def to_tensors(q: QTensor, name: str, turned: bool = False) -> list[ir.TensorProtocol]:
    """The stored parts of `q`, or of its transpose, named `<name>.<part>`, in the order of the form's
    parts."""
    form = FORMS[q.format]
    arrays: dict[str, npt.NDArray] = {"block_scale": q.block_scale, "global_scale": np.array(q.global_scale)}
    codes = q.codes.T if turned else q.codes
    if q.block_offset is not None:
        arrays[FORMATS[q.format].offset] = q.block_offset
    tensors: list[ir.TensorProtocol] = []
    for part in form.parts:
        label = f"{name}.{part}"
        if part == "codes":
            tensors.append(_packed(form, codes, label))
        elif part == "zero_point":
            tensors.append(_packed(form, arrays[part], label))
        else:
            array = np.ascontiguousarray(arrays[part].T) if turned and arrays[part].ndim else arrays[part]
            tensors.append(ir.Tensor(array, name=label))
    return tensors


def from_node(node: ir.Node) -> QTensor:
    """The weight [K, N] that a low-bit linear layer multiplies by, or a lookup picks columns of, its parts
    constant; of a table [V, H], whose blocks lie along its rows, the transpose [H, V]. InputError when they
    do not fit together."""
    table = node.op_type in LOOKUPS
    form = LOOKUPS[node.op_type] if table else OF_LAYERS[node.op_type]
    tensors = {}
    for part, value in zip(form.parts, node.inputs[1:], strict=True):
        assert value is not None and value.const_value is not None
        tensors[part] = value.const_value
    spec = FORMATS[form.format]
    codes, scale = _codes(form, tensors["codes"]), tensors["block_scale"].numpy()
    if table:
        codes, scale = np.ascontiguousarray(codes.T), np.ascontiguousarray(scale.T)
    optional: dict[str, npt.NDArray | np.float32] = {}
    if "global_scale" in tensors:
        optional["global_scale"] = np.float32(tensors["global_scale"].numpy().reshape(()))
    if spec.offset == "zero_point":
        optional["block_offset"] = _codes(form, tensors["zero_point"])
    elif spec.offset == "mean":
        optional["block_offset"] = tensors["mean"].numpy()
    K, N = codes.shape
    return QTensor(form.format, (K, N), codes, scale, **optional)  # type: ignore[arg-type]


def to_arrays(q: QTensor) -> Arrays:
    """The parts of `q` as arrays of data types that safetensors has."""
    bits = FORMS[q.format].code_bits
    arrays = {
        "codes": pack_bits(q.codes, bits),
        "block_scale": np.ascontiguousarray(q.block_scale).view(f"u{q.block_scale.itemsize}"),
        "global_scale": np.array([q.global_scale], np.float32),
    }
    if q.block_offset is not None:
        arrays["block_offset"] = np.ascontiguousarray(q.block_offset)
    return arrays


def from_arrays(weight_format: str, shape: tuple[int, int], arrays: Mapping[str, npt.NDArray]) -> QTensor:
    """The inverse. InputError when the parts do not fit."""
    return QTensor(
        weight_format,
        shape,
        unpack_bits(arrays["codes"], shape, FORMS[weight_format].code_bits),
        arrays["block_scale"].view(FORMATS[weight_format].scale_dtype),
        np.float32(arrays["global_scale"][0]),
        arrays.get("block_offset"),
    )


def _packed(form: WeightForm, codes: npt.NDArray[np.uint8], name: str) -> ir.TensorProtocol:
    """Codes as elements of the form's type, whose bits are those of the value that a code stands for (E2M1:
    of the code)."""
    if form.code_type != ir.DataType.FLOAT4E2M1:
        codes = group.to_fields(FORMATS[form.format], codes, form.code_bits)
    if form.code_bits == 8:
        return ir.Tensor(np.ascontiguousarray(codes).view(np.int8), name=name)
    return ir.PackedTensor(pack_bits(codes, form.code_bits), form.code_type, shape=codes.shape, name=name)


def _codes(form: WeightForm, tensor: ir.TensorProtocol) -> npt.NDArray[np.uint8]:
    """The inverse: codes, uint8."""
    if form.code_type == ir.DataType.FLOAT4E2M1:
        return tensor.numpy().view(np.uint8) & np.uint8(15)
    return group.from_integers(FORMATS[form.format], tensor.numpy())
