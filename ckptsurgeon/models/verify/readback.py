"""Compares one tensor on a device bit for bit with the bytes of a file.

Bytes are compared, so NaN payloads and the sign of zero count. Only if the model has another dtype, values are compared after torch's cast,
and a note says so. Memory: the tensor on the CPU, and chunks of `PIECE` elements.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.report import Finding
from ckptsurgeon.streaming.values import code_of, memory_of
from ckptsurgeon.tensors import TensorMeta

BytesLike = bytes | bytearray | memoryview
PIECE = 1 << 22


def compare(key: str, meta: TensorMeta, value: torch.Tensor, data: BytesLike, finite: bool) -> list[Finding]:
    """Findings of the codes `differs` (error), `dtype` (note) and `non-finite` (warning, error with `finite`).

    Args:
        key: the model's name of the tensor.
        meta: the file's tensor, of the same shape.
        value: the model's tensor, on any device.
        data: the file's dense bytes.

    >>> compare("w", TensorMeta("w", "U8", (2,), (1,)), torch.tensor([1, 2], dtype=torch.uint8), b"\\x01\\x03", False)[0].message
    '1 of 2 elements differ from the file, the first at (1,)'
    """
    size = memoryview(data).nbytes
    if size != meta.nbytes:
        return [Finding("differs", f"our reader gives {size:,} bytes where the shape and dtype need {meta.nbytes:,}", key)]
    return [*dtype_note(key, code_of(value), meta.dtype), *findings_of(key, meta, differences(meta.dtype, value, data), finite)]


@dataclass(frozen=True)
class Differences:
    """The differences between a model's tensor, or a part of it, and a file's.

    Attributes:
        elements: the number of elements that were compared.
        wrong: how many of them differ.
        first: the index of the first one that differs, in the flattened tensor; None if none does.
        nans, infinities: how many elements of the model are NaN or infinite.
    """

    elements: int
    wrong: int = 0
    first: int | None = None
    nans: int = 0
    infinities: int = 0


def differences(dtype: str, value: torch.Tensor, data: BytesLike) -> Differences:
    """Compare a model's tensor, on any device, with a file's dense bytes of dtype `dtype` (safetensors' code)."""
    own = value.detach().to("cpu").resolve_conj().resolve_neg().reshape(-1)
    if not own.numel():
        return Differences(0)
    file = _flat(data).view(getattr(torch, BY_CODE[dtype].torch))
    wrong, first, nans, infinities = 0, None, 0, 0
    for start in range(0, own.numel(), PIECE):
        model_chunk, file_chunk = own[start : start + PIECE], file[start : start + PIECE]
        unlike = _unlike(model_chunk, file_chunk)
        if unlike is not None:
            wrong += int(unlike.sum())
            first = start + int(unlike.to(torch.uint8).argmax()) if first is None else first
        non_finite = _non_finite(model_chunk)
        nans, infinities = nans + non_finite[0], infinities + non_finite[1]
    return Differences(own.numel(), wrong, first, nans, infinities)


def findings_of(key: str, meta: TensorMeta, result: Differences, finite: bool) -> list[Finding]:
    """The findings of `compare` for a result of `differences`; `meta` is the file's tensor."""
    findings = []
    if result.first is not None:
        place = tuple(int(index) for index in torch.unravel_index(torch.tensor(result.first), meta.shape)) if meta.shape else ()
        findings.append(
            Finding("differs", f"{result.wrong:,} of {result.elements:,} elements differ from the file, the first at {place}", key)
        )
    if result.nans or result.infinities:
        counts = " and ".join(f"{count:,} {word}" for count, word in ((result.nans, "NaN"), (result.infinities, "infinite")) if count)
        message = f"has {counts} of {result.elements:,} values"
        findings.append(Finding("non-finite", message, key, "error" if finite else "warning"))
    return findings


def dtype_note(key: str, model_dtype: str, file_dtype: str) -> list[Finding]:
    """A note of the code `dtype` if the two dtypes (safetensors' codes) differ."""
    if model_dtype == file_dtype:
        return []
    return [Finding("dtype", f"loaded as {model_dtype} from {file_dtype}", key, "note")]


def _flat(data: BytesLike) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the buffer is read-only; it is never written to
        return torch.frombuffer(data, dtype=torch.uint8)


def _unlike(model: torch.Tensor, file: torch.Tensor) -> torch.Tensor | None:
    """A mask of the elements that differ in any byte; None if none does. After a cast all NaNs are equal, since a cast on a device need not
    keep their payload."""
    is_cast, file = model.dtype != file.dtype, file.to(model.dtype)
    model_bytes, file_bytes = _flat(memory_of(model)), file.view(torch.uint8)
    if torch.equal(model_bytes, file_bytes):
        return None
    unlike = (model_bytes != file_bytes).view(model.numel(), -1).any(dim=1)
    if not is_cast or not (model.is_floating_point() or model.is_complex()):
        return unlike
    unlike &= ~(torch.isnan(_wide(model)) & torch.isnan(_wide(file)))
    return unlike if bool(unlike.any()) else None


def _non_finite(tensor: torch.Tensor) -> tuple[int, int]:
    """The numbers of NaN and of infinite elements."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0, 0
    wide = _wide(tensor)
    if bool(torch.isfinite(wide).all()):
        return 0, 0
    nans = torch.isnan(wide)
    return int(nans.sum()), int((~torch.isfinite(wide) & ~nans).sum())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype that has all operations: complex half and the 8-bit floats have only few."""
    if tensor.is_complex():
        return tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor
    return tensor.to(torch.float32) if tensor.element_size() == 1 else tensor
