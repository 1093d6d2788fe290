"""Compares a model's present values with a file, bit for bit. In a model over ranks, each rank compares its own part.

Nothing is loaded, and the model is neither copied nor changed. Every rank reads the blocks of its own tensors; all ranks get the same
findings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import FormatError, ModelError
from ckptsurgeon.hints import shortened
from ckptsurgeon.models.sharded.ranks import Ranks
from ckptsurgeon.models.sharded.values import Part, bands, narrowed
from ckptsurgeon.models.target.conversions import find_naming
from ckptsurgeon.models.target.loaders import changing_loaders
from ckptsurgeon.models.target.sharding import is_sharded, refuse_flat
from ckptsurgeon.models.target.skeleton import checkpoint_of_state_dict, state_dict_of
from ckptsurgeon.models.verify import loading, readback
from ckptsurgeon.models.verify.readback import Differences
from ckptsurgeon.planning.fits import misfits, shapes_of, tied_keys
from ckptsurgeon.planning.own_loading.read_by_library import read_by_library
from ckptsurgeon.progress import phase
from ckptsurgeon.report import Finding, Verification
from ckptsurgeon.storage.pieces import Block
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import memory_of, tensor_from
from ckptsurgeon.tensors import Checkpoint, TensorMeta
from ckptsurgeon.wrappers import WRAPPERS, unwrap

Row = tuple[str, Block, Differences]


def verify_in_place(
    checkpoint: Checkpoint, model: nn.Module, reader: Reader, ranks: Ranks, *, finite: bool = False, conversions: bool = True
) -> Verification:
    """Compare a model's values with a file, open in `reader`. All ranks that the model is spread over must call this together.

    Args:
        finite: NaN and infinite values are errors, not warnings.
        conversions: read the file's names as the model's library does.

    Returns: The same result on every rank. Its findings' codes: `missing`, `unexpected`, `shape`, `kind`, `differs`, `checksum` (errors),
        `non-finite` (a warning, or an error with `finite`), `tied`, `hook`, `dtype`, `conversions` (notes).

    Raises:
        ModelError: the model is in FullyShardedDataParallel, or has no values: it is on the meta device.
    """
    with ranks.step() as step:
        refuse_flat(model.modules())
        own = state_dict_of(model, checkpoint.path)
        _refuse_meta(own)
        state, checkpoint = _bare(own), replace(checkpoint, tensors=_bare(checkpoint), entries=_bare(checkpoint.entries))
        skeleton = checkpoint_of_state_dict(state, checkpoint.path)
        as_read = read_by_library(checkpoint, replace(skeleton, naming=find_naming(model, own) if conversions else None))
        view = as_read.checkpoint
        aliases = tied_keys(view, shapes_of(view), skeleton.ties)
        findings = [*as_read.notes(), *as_read.forgiven(misfits(shapes_of(view), shapes_of(skeleton), aliases))]
        changed = {unwrap(key, WRAPPERS) for loader in changing_loaders(model, own).values() for key in loader.keys}
        metas = {key: view[aliases.get(key, key)] for key in skeleton if aliases.get(key, key) in view}
        metas = {key: meta for key, meta in metas.items() if meta.shape == skeleton[key].shape}
        read = loading.reader(checkpoint, as_read, reader.read)
        rows: list[Row] = []
        damaged: list[Finding] = []
        parts = list(_parts({key: state[key] for key in metas if key not in changed}))
        with phase("comparing", sum(part.memory.nbytes for part in parts)) as advance:
            for part in parts:
                try:
                    rows.extend(_compared(part, metas[part.key], reader, read))
                except FormatError as error:
                    damaged.append(Finding("checksum", error.reason, part.key))
                advance(part.memory.nbytes)
        reader.check_unchanged()
        step.same = {"file": checkpoint.fingerprint, "model": skeleton.fingerprint}
        step.own = rows, damaged
    findings += dict.fromkeys(finding for _, of_rank in step.by_rank for finding in of_rank)
    whole = _together(rows for rows, _ in step.by_rank)
    for key, meta in metas.items():
        if key in changed:
            findings.append(Finding("hook", "is changed by the model's own loading code, so it is not compared", key, "note"))
            continue
        findings += readback.dtype_note(key, skeleton[key].dtype, meta.dtype)
        if key in whole:
            findings += readback.findings_of(key, meta, whole[key], finite)
    devices = {str(value.device) for value in state.values() if isinstance(value, torch.Tensor)}
    fresh = (checkpoint.provenance or {}).get("fresh")
    return Verification(
        " and ".join(sorted(devices)) or "cpu",
        sum(key not in changed for key in metas),
        tuple(findings),
        fresh=tuple(map(str, fresh)) if isinstance(fresh, (list, tuple)) else None,
        in_place=True,
    )


def _refuse_meta(state: Mapping[str, Any]) -> None:
    on_meta = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if on_meta:
        raise ModelError(
            "has no values: it is on the meta device",
            key=on_meta[0],
            problems=shortened(on_meta[1:]),
            hint="model.to_empty(device=…), transfer the checkpoint, then verify",
        )


def _bare(named: Mapping[str, Any]) -> dict[str, Any]:
    """The values by names without wrappers' segments, if these names are all different."""
    bare = {unwrap(key, WRAPPERS): value for key, value in named.items()}
    return bare if len(bare) == len(named) else dict(named)


def _parts(state: Mapping[str, torch.Tensor]) -> Iterable[Part]:
    if any(map(is_sharded, state.values())):
        from ckptsurgeon.models.sharded.planner import own_parts

        return own_parts(state)
    return [Part(key, tuple((0, size) for size in tensor.shape), tensor.detach()) for key, tensor in state.items()]


def _compared(part: Part, meta: TensorMeta, reader: Reader, read: loading.Read) -> Iterator[Row]:
    """The differences between a part and the file, band by band. The first wrong element is counted in the whole tensor."""
    size = BY_CODE[meta.dtype].size
    whole = None if meta.place is not None else tensor_from(read(meta), meta.dtype).view(meta.shape)
    differences = []
    for band in bands(part.block, size) if meta.as_stored else [part.block]:
        data = reader.block(meta, band) if whole is None else memory_of(narrowed(whole, band))
        difference = readback.differences(meta.dtype, narrowed(part.memory, band, part.block), data)
        if difference.first is not None:
            difference = replace(difference, first=_in_whole(difference.first, band, meta.shape))
        differences.append(difference)
    yield part.key, part.block, _sum(differences)


def _in_whole(in_block: int, block: Block, shape: tuple[int, ...]) -> int:
    """The index, in the flattened whole tensor, of the element with index `in_block` in a flattened block."""
    whole_index, stride = 0, 1
    for (start, stop), size in zip(reversed(block), reversed(shape), strict=True):
        in_block, index = divmod(in_block, stop - start)
        whole_index += (start + index) * stride
        stride *= size
    return whole_index


def _sum(differences: Iterable[Differences]) -> Differences:
    rows = list(differences)
    firsts = [row.first for row in rows if row.first is not None]
    counts = (sum(getattr(row, name) for row in rows) for name in ("elements", "wrong", "nans", "infinities"))
    elements, wrong, nans, infinities = counts
    return Differences(elements, wrong, min(firsts, default=None), nans, infinities)


def _together(by_rank: Iterable[Iterable[Row]]) -> dict[str, Differences]:
    """The differences of each tensor. Of a block that several ranks have, the copy that differs most counts."""
    by_key: dict[str, dict[Block, Differences]] = {}
    for key, block, difference in (row for rank in by_rank for row in rank):
        by_block = by_key.setdefault(key, {})
        by_block[block] = max(by_block.get(block, difference), difference, key=lambda row: (row.wrong, row.nans + row.infinities))
    return {key: _sum(blocks.values()) for key, blocks in by_key.items()}
