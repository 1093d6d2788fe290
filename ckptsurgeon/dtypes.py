"""One table of dtypes: safetensors' code, torch's name, torch's storage class, size and kind.

Facts only, from safetensors' `Dtype` and torch's `torch.storage` classes; no torch is imported here.
A dtype without a storage class is stored by torch in an `UntypedStorage`; one with `safetensors=False` has no code there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "int", "bool", "complex", "quantized"]


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype: `code` as safetensors writes it, `torch` as in `torch.float32`, `size` in bytes per element."""

    code: str
    torch: str
    size: int
    kind: Kind
    storage_class: str | None
    safetensors: bool = True


# In the order in which safetensors lays tensors out: the last first.
TABLE: tuple[DType, ...] = (
    DType("BOOL", "bool", 1, "bool", "BoolStorage"),
    DType("U8", "uint8", 1, "int", "ByteStorage"),
    DType("I8", "int8", 1, "int", "CharStorage"),
    DType("F8_E5M2", "float8_e5m2", 1, "float", None),
    DType("F8_E4M3", "float8_e4m3fn", 1, "float", None),
    DType("F8_E8M0", "float8_e8m0fnu", 1, "float", None),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 1, "float", None),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 1, "float", None),
    DType("I16", "int16", 2, "int", "ShortStorage"),
    DType("U16", "uint16", 2, "int", None),
    DType("F16", "float16", 2, "float", "HalfStorage"),
    DType("BF16", "bfloat16", 2, "float", "BFloat16Storage"),
    DType("I32", "int32", 4, "int", "IntStorage"),
    DType("U32", "uint32", 4, "int", None),
    DType("F32", "float32", 4, "float", "FloatStorage"),
    DType("C64", "complex64", 8, "complex", "ComplexFloatStorage"),
    DType("F64", "float64", 8, "float", "DoubleStorage"),
    DType("I64", "int64", 8, "int", "LongStorage"),
    DType("U64", "uint64", 8, "int", None),
    DType("C128", "complex128", 16, "complex", "ComplexDoubleStorage", safetensors=False),
    DType("C32", "complex32", 4, "complex", None, safetensors=False),
)

BY_CODE: dict[str, DType] = {row.code: row for row in TABLE}
BY_TORCH: dict[str, DType] = {row.torch: row for row in TABLE} | {
    alias: next(row for row in TABLE if row.torch == name)
    for alias, name in {"half": "float16", "float": "float32", "double": "float64", "long": "int64", "int": "int32"}.items()
}
BY_STORAGE_CLASS: dict[str, DType] = {row.storage_class: row for row in TABLE if row.storage_class}
# Of torch's quantized tensors, whose numbers mean nothing without a scale. They are never a tensor's dtype here.
QUANTIZED: dict[str, DType] = {
    name: DType(code, torch, size, "quantized", name, safetensors=False)
    for name, code, torch, size in (
        ("QInt8Storage", "QI8", "qint8", 1),
        ("QUInt8Storage", "QU8", "quint8", 1),
        ("QInt32Storage", "QI32", "qint32", 4),
        ("QUInt4x2Storage", "QU4X2", "quint4x2", 1),
        ("QUInt2x4Storage", "QU2X4", "quint2x4", 1),
    )
}
SAFETENSORS_RANK: dict[str, int] = {row.code: rank for rank, row in enumerate(TABLE)}

DTYPE_CHOICES = (
    "source",
    "target",
    "F16",
    "BF16",
    "F32",
    "F64",
)  # the side whose dtypes the output has, or one dtype for all floating tensors

# Other names of dtypes: torch's own, and the short names of training code.
_ALSO = {
    "U8": ("byte",),
    "I8": ("char",),
    "I16": ("short",),
    "F16": ("fp16",),
    "BF16": ("bf16",),
    "F32": ("fp32",),
    "C64": ("cfloat",),
    "F64": ("fp64",),
    "C128": ("cdouble",),
    "C32": ("chalf",),
}
_NAMES: dict[str, DType] = (
    {row.code.lower(): row for row in TABLE} | BY_TORCH | {name: BY_CODE[code] for code, names in _ALSO.items() for name in names}
)


def named(word: object) -> DType | None:
    """The dtype of this name: safetensors' code, or any of torch's names, in any case, with or without `torch.`.

    >>> [dtype.code for word in ("bf16", "torch.float16", "Half", "F8_E4M3") if (dtype := named(word))]
    ['BF16', 'F16', 'F16', 'F8_E4M3']
    """
    return _NAMES.get(str(word).strip().lower().removeprefix("torch."))


def choice(word: object) -> str:
    """The choice of `DTYPE_CHOICES` with this name; any other word unchanged.

    >>> choice("Target"), choice("fp16"), choice("I64")
    ('target', 'F16', 'I64')
    """
    text = str(word).strip()
    dtype = named(text)
    name = text.lower() if dtype is None else dtype.code
    return name if name in DTYPE_CHOICES else text


def all_names() -> list[str]:
    """Every name that `named` knows; codes in upper case, as safetensors writes them."""
    return [*BY_CODE, *(name for name in _NAMES if name.upper() not in BY_CODE)]


def widens(source: str, target: str) -> bool:
    """Whether every value of dtype `source` is a value of dtype `target`, both by their codes.

    >>> widens("BF16", "F32"), widens("F32", "BF16"), widens("U8", "I32"), widens("I8", "U16")
    (True, False, True, False)
    """
    narrow, wide = BY_CODE[source], BY_CODE[target]
    if source == target:
        return True
    if narrow.kind == wide.kind == "float":
        return wide.size > narrow.size and target in ("F32", "F64")
    return narrow.kind == wide.kind == "int" and wide.size > narrow.size and (source[0] == target[0] or target[0] == "I")
