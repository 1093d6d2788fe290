"""Compares one tensor on a device bit for bit with the bytes of a file.

Bytes are compared, so NaN payloads and the sign of zero count. Only where the model has another dtype are values compared after torch's
cast, which a note says. Memory: the tensor on the CPU, and chunks of `PIECE` elements.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from ckptsurgeon.dtypes import BY_CODE, BY_TORCH
from ckptsurgeon.report import Finding
from ckptsurgeon.streaming.values import memory_of
from ckptsurgeon.tensors import TensorMeta

BytesLike = bytes | bytearray | memoryview
PIECE = 1 << 22


def compare(key: str, meta: TensorMeta, value: torch.Tensor, given: BytesLike, finite: bool) -> list[Finding]:
    """Findings of the codes `differs` (error), `dtype` (note) and `non-finite` (warning, error with `finite`).

    Args:
        key: the model's name of the tensor.
        meta: the file's tensor, of the same shape.
        value: the model's tensor, on any device.
        given: the file's dense bytes.

    >>> compare("w", TensorMeta("w", "U8", (2,), (1,)), torch.tensor([1, 2], dtype=torch.uint8), b"\\x01\\x03", False)[0].message
    '1 of 2 elements differ from the file, the first at (1,)'
    """
    size = memoryview(given).nbytes
    if size != meta.nbytes:
        return [Finding("differs", f"our reader gives {size:,} bytes where the shape and dtype need {meta.nbytes:,}", key)]
    code = BY_TORCH[str(value.dtype).removeprefix("torch.")].code
    return [*dtype_note(key, code, meta.dtype), *told(key, meta, differences(meta.dtype, value, given), finite)]


@dataclass(frozen=True)
class Differences:
    """What sets some elements of a model's tensor apart from a file's: how many there are, how many are `wrong`, the number of the first
    wrong one (None without one), and how many of the model's are NaN or infinite."""

    elements: int
    wrong: int = 0
    first: int | None = None
    nans: int = 0
    infinities: int = 0


def differences(dtype: str, value: torch.Tensor, given: BytesLike) -> Differences:
    """What sets a model's tensor, on any device, apart from a file's dense bytes of the dtype with the code `dtype`."""
    own = value.detach().to("cpu").resolve_conj().resolve_neg().reshape(-1)
    if not own.numel():
        return Differences(0)
    file = _flat(given).view(getattr(torch, BY_CODE[dtype].torch))
    wrong, first, nans, infinities = 0, None, 0, 0
    for start in range(0, own.numel(), PIECE):
        mine, theirs = own[start : start + PIECE], file[start : start + PIECE]
        unlike = _unlike(mine, theirs) if mine.dtype == theirs.dtype else _unlike_after_cast(mine, theirs.to(mine.dtype))
        if unlike is not None:
            wrong += int(unlike.sum())
            first = start + int(unlike.to(torch.uint8).argmax()) if first is None else first
        non_finite = _non_finite(mine)
        nans, infinities = nans + non_finite[0], infinities + non_finite[1]
    return Differences(own.numel(), wrong, first, nans, infinities)


def told(key: str, meta: TensorMeta, found: Differences, finite: bool) -> list[Finding]:
    """Findings as `compare` gives them, for the elements of the tensor `meta`."""
    findings = []
    if found.first is not None:
        place = tuple(int(index) for index in torch.unravel_index(torch.tensor(found.first), meta.shape)) if meta.shape else ()
        findings.append(
            Finding("differs", f"{found.wrong:,} of {found.elements:,} elements differ from the file, the first at {place}", key)
        )
    if found.nans or found.infinities:
        counts = " and ".join(f"{count:,} {word}" for count, word in ((found.nans, "NaN"), (found.infinities, "infinite")) if count)
        message = f"has {counts} of {found.elements:,} values"
        findings.append(Finding("non-finite", message, key, "error" if finite else "warning"))
    return findings


def dtype_note(key: str, model_dtype: str, file_dtype: str) -> list[Finding]:
    """A note of the code `dtype` where the two (safetensors' codes) are not the same."""
    if model_dtype == file_dtype:
        return []
    return [Finding("dtype", f"loaded as {model_dtype} from {file_dtype}", key, "note")]


def _flat(given: BytesLike) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the buffer can't be written to, which nobody does
        return torch.frombuffer(given, dtype=torch.uint8)


def _unlike(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor | None:
    """Which elements differ in any byte; None for none."""
    own, other = _flat(memory_of(mine)), theirs.view(torch.uint8)
    if torch.equal(own, other):
        return None
    return (own != other).view(mine.numel(), -1).any(dim=1)


def _unlike_after_cast(mine: torch.Tensor, cast: torch.Tensor) -> torch.Tensor | None:
    """As `_unlike`; a NaN is like any NaN here, since a cast on a device need not keep its payload."""
    unlike = _unlike(mine, cast)
    if unlike is None or not (mine.is_floating_point() or mine.is_complex()):
        return unlike
    unlike &= ~(torch.isnan(_wide(mine)) & torch.isnan(_wide(cast)))
    return unlike if bool(unlike.any()) else None


def _non_finite(tensor: torch.Tensor) -> tuple[int, int]:
    """How many elements are NaN and how many infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0, 0
    wide = _wide(tensor)
    if bool(torch.isfinite(wide).all()):
        return 0, 0
    nans = torch.isnan(wide)
    return int(nans.sum()), int((~torch.isfinite(wide) & ~nans).sum())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """A dtype in which every operation is known: complex half and the 8-bit floats are few operations' own."""
    if tensor.is_complex():
        return tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor
    return tensor.to(torch.float32) if tensor.element_size() == 1 else tensor
