"""A written checkpoint held against a fresh model on a device: loaded by the official readers, read back, compared bit for bit.

It believes neither our writer nor our reader: torch and safetensors load the file, and what the model then holds is compared with the
bytes that our reader gives from it. Everything that is wrong is found in one run. The file is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ckptsurgeon.dtypes import BY_TORCH
from ckptsurgeon.errors import FormatError, TargetError
from ckptsurgeon.models.init.values import tensor_bytes
from ckptsurgeon.models.own_loading.load import load, reachable_keys
from ckptsurgeon.models.own_loading.probe import probe_file
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.conversions import find_naming
from ckptsurgeon.models.target.devices import check_device
from ckptsurgeon.models.target.loaders import find_loaders
from ckptsurgeon.models.target.skeleton import checkpoint_of, checkpoint_of_state_dict, state_dict_of
from ckptsurgeon.models.verify import by_library, forward, loading, readback
from ckptsurgeon.planning.fits import fits
from ckptsurgeon.planning.own_loading.read_by_library import read_by_library
from ckptsurgeon.progress import phase
from ckptsurgeon.report import Finding, Verification
from ckptsurgeon.streaming.values import tensor_from
from ckptsurgeon.tensors import Checkpoint, Refused, TensorMeta, contiguous_stride

__all__ = ["check_device", "verify_on_device"]
Read = Callable[[TensorMeta], readback.BytesLike]


def verify_on_device(
    checkpoint: Checkpoint,
    model_builder: Callable[[], nn.Module],
    device: str,
    *,
    read: Read,
    finite: bool = False,
    inputs: tuple[str, ...] = (),
    conversions: bool = True,
) -> Verification:
    """Load a checkpoint strictly into a fresh model on a device, and compare every tensor of it with the file, bitwise.

    Args:
        checkpoint: the file as our reader sees it.
        model_builder: makes the fresh model: `build` of a spec, or `build_meta` for the device `meta`.
        device: `cpu`, `cuda:0`, `mps` …; on `meta` names, shapes and dtypes are compared, and a note says so.
        read: a tensor's dense, row-major bytes (`nbytes` of them) from the file, by our reader; FormatError for data that is damaged.
        finite: NaN and infinite values are errors, not warnings.
        conversions: read the file as the model's library reads its files, and have the library load it where that changes anything.
        inputs: texts such as `1x3x32x32` or `1x16:I64`, one per positional argument, for one forward pass in eval mode.

    Returns:
        A verification whose `tensors` counts what was compared. Its findings' codes: `missing`, `unexpected`, `shape`, `kind`,
        `load`, `device`, `differs`, `checksum`, `reader`, `forward` (errors), `non-finite` (a warning, or an error with `finite` and in
        outputs), `output` (a warning), `tied`, `hook`, `dtype`, `meta`, `no-forward` (notes).

    Raises:
        DeviceError: the device is not on this machine.
        ModelError: an input's text is malformed.
        TargetError, FormatError: the model can't be built, or has tensors that no checkpoint can hold.
    """
    place = check_device(device)
    for text in inputs:
        forward.parse_input(text)
    model = user_code.call(checkpoint.path, model_builder)
    if place.type == "meta":
        return _by_names(checkpoint, model, device, bool(inputs), conversions)
    record = _fresh(checkpoint)
    try:
        user_code.call(checkpoint.path, model.to, place)
    except TargetError as error:
        finding = Finding("device", f"the model can't be moved to {device}: {error.reason}")
        return Verification(device=device, tensors=0, findings=(finding,), fresh=record)
    state = state_dict_of(model, checkpoint.path)
    skeleton = checkpoint_of_state_dict(state, checkpoint.path)
    as_read = read_by_library(checkpoint, replace(skeleton, naming=find_naming(model, state) if conversions else None))
    del state
    with phase("loading", checkpoint.nbytes):
        if as_read.naming is None:
            loaded = loading.load_strictly(model, checkpoint, skeleton)
        else:
            read = by_library.reader(checkpoint, as_read, read)
            loaded = by_library.load_by_library(model, checkpoint, skeleton, as_read, read)
    findings = list(loaded.findings)
    findings += _readers_agree(checkpoint, loaded) if loaded.complete else []
    compared = 0
    if loaded.complete:
        by_torch = _ByTorch(as_read.checkpoint, model_builder, read)
        compared, unlike = _read_back(as_read.checkpoint, model, loaded, read, finite, by_torch)
        findings += unlike
    outputs: dict[str, tuple[int, ...]] = {}
    if inputs and any(finding.level == "error" and finding.code != "non-finite" for finding in findings):
        findings.append(Finding("no-forward", "no forward pass was run, since the checkpoint did not load", level="note"))
    elif inputs:
        outputs, seen = forward.run(model, inputs, place, checkpoint.path)
        findings += seen
    return Verification(device=device, tensors=compared, findings=tuple(findings), outputs=outputs, fresh=record)


def _by_names(checkpoint: Checkpoint, model: nn.Module, device: str, asked_forward: bool, conversions: bool) -> Verification:
    """What can be told on meta: names, shapes and dtypes, by our reader alone."""
    skeleton = checkpoint_of(model, checkpoint.path)
    as_read = read_by_library(checkpoint, skeleton if conversions else replace(skeleton, naming=None))
    taken = probe_file(lambda: model, skeleton, as_read.checkpoint)
    misfits, loaded = fits(as_read.checkpoint, skeleton, taken)
    findings = [*as_read.notes(), *as_read.forgiven(misfits)]
    findings += [Finding("meta", "on meta only names, shapes and dtypes are compared; no value was loaded", level="note")]
    if asked_forward:
        findings.append(Finding("no-forward", "no forward pass was run: there are no values on meta", level="note"))
    findings += [Finding("hook", words, name, "note") for name, words in taken.words()]
    findings += [note for key, meta in loaded.items() for note in readback.dtype_note(key, skeleton[key].dtype, meta.dtype)]
    return Verification(device=device, tensors=len(loaded), findings=tuple(findings), bitwise=False, fresh=_fresh(checkpoint))


def _readers_agree(checkpoint: Checkpoint, loaded: loading.Loaded) -> list[Finding]:
    """Errors for keys that only one of the two readers sees; names that safetensors' metadata adds are known to be ours alone."""
    theirs = {key for key, shape in loaded.found.items() if shape is not None}
    findings = []
    for key in dict.fromkeys((*checkpoint, *theirs)):
        if key not in checkpoint:
            findings.append(Finding("reader", "the official reader gives this tensor, and ours doesn't", key))
        elif key not in theirs and key not in checkpoint.metadata:
            findings.append(Finding("reader", "our reader gives this tensor, and the official one doesn't", key))
        elif key in theirs and checkpoint[key].shape != loaded.found[key]:
            shapes = f"{checkpoint[key].shape}, and the official one {loaded.found[key]}"
            findings.append(Finding("reader", f"our reader gives the shape {shapes}", key))
    return findings


def _read_back(
    checkpoint: Checkpoint, model: nn.Module, loaded: loading.Loaded, read: Read, finite: bool, by_torch: _ByTorch
) -> tuple[int, list[Finding]]:
    """How many tensors were compared, and what was found, one tensor in memory at a time."""
    compared, findings = 0, []
    state = state_dict_of(model, checkpoint.path)
    changing = {key for loader in find_loaders(model, state).values() if loader.changes for key in loader.keys}
    pairs = [(key, value, checkpoint.get(loaded.aliases.get(key, key))) for key, value in state.items() if isinstance(value, torch.Tensor)]
    with phase("comparing", sum(meta.nbytes for _, _, meta in pairs if meta is not None)) as advance:
        for key, value, meta in pairs:
            if meta is None or meta.shape != tuple(value.shape):
                continue
            compared += 1
            try:
                given = read(meta)
            except FormatError as error:
                findings.append(Finding("checksum", error.reason, key))
                continue
            found = readback.compare(key, meta, value, given, finite)
            if key in changing and any(finding.code == "differs" for finding in found):
                found = by_torch.compare(key, value, finite)
            findings += found
            advance(meta.nbytes)
    return compared, findings


@dataclass
class _ByTorch:
    """What torch loads into another fresh model from the bytes that our reader gives: the measure of values that loading code changes."""

    checkpoint: Checkpoint
    build: Callable[[], nn.Module]
    read: Read
    state: Mapping[str, Any] | None = None

    def compare(self, key: str, value: torch.Tensor, finite: bool) -> list[Finding]:
        """Findings as `readback.compare` gives them, and a note that the measure is another."""
        if self.state is None:
            self.state = self._load()
        wanted = self.state[key]
        code = BY_TORCH[str(wanted.dtype).removeprefix("torch.")].code
        meta = TensorMeta(key, code, tuple(wanted.shape), contiguous_stride(tuple(wanted.shape)))
        note = Finding(
            "hook", "is changed by the model's own loading code, so it is compared with what torch loads, not with the file", key, "note"
        )
        return [note, *readback.compare(key, meta, value, tensor_bytes(wanted), finite)]

    def _load(self) -> Mapping[str, Any]:
        path, checkpoint = self.checkpoint.path, self.checkpoint
        model = user_code.call(path, self.build)
        own = state_dict_of(model, path)
        loaders = {place: loader for place, loader in find_loaders(model, own).items() if loader.changes}
        keys = reachable_keys(own, loaders)
        values = {
            key: tensor_from(self.read(meta), meta.dtype).view(meta.shape)
            for key, meta in checkpoint.items()
            if key in keys or key not in own
        }
        versions = {place: local for place, local in checkpoint.module_metadata.items() if place in loaders}
        extra = {key: value for key, value in checkpoint.entries.items() if not isinstance(value, Refused)}
        load(model, own, values, extra, loaders, versions, [key for key in checkpoint if key not in values])
        return state_dict_of(model, path)


def _fresh(checkpoint: Checkpoint) -> tuple[str, ...] | None:
    found = (checkpoint.provenance or {}).get("fresh")
    return tuple(str(key) for key in found) if isinstance(found, (list, tuple)) else None
