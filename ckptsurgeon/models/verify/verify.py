"""Verifies a written checkpoint with a fresh model on a device: loads it by the official readers and compares every tensor bit for bit.

It trusts neither our writer nor our reader: torch and safetensors load the file, and the model's values are then compared with the bytes
that our reader gives. A device that this machine has not is refused. All problems are found in one run. The file is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import DeviceError, FormatError, TargetError
from ckptsurgeon.models.init.values import tensor_bytes
from ckptsurgeon.models.own_loading.load import load, reachable_keys
from ckptsurgeon.models.own_loading.probe import probe_file
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.conversions import find_naming
from ckptsurgeon.models.target.loaders import changing_loaders
from ckptsurgeon.models.target.skeleton import checkpoint_of, checkpoint_of_state_dict, state_dict_of
from ckptsurgeon.models.verify import forward, loading, readback
from ckptsurgeon.planning.fits import fits
from ckptsurgeon.planning.own_loading.read_by_library import read_by_library
from ckptsurgeon.progress import phase
from ckptsurgeon.report import Finding, Verification
from ckptsurgeon.streaming.values import code_of, tensor_from
from ckptsurgeon.tensors import Checkpoint, Refused, TensorMeta, contiguous_stride

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
        model_builder: builds the fresh model: `build` of a spec, or `build_meta` for the device `meta`.
        device: `cpu`, `cuda:0`, `mps` …; on `meta` names, shapes and dtypes are compared, and a note says so.
        read: returns a tensor's `nbytes` dense, row-major bytes from the file, by our reader; FormatError for damaged data.
        finite: NaN and infinite values are errors, not warnings.
        conversions: read the file as the model's library reads its files, and have the library load it if that changes anything.
        inputs: texts such as `1x3x32x32` or `1x16:I64`, one per positional argument, for one forward pass in eval mode.

    Returns:
        A verification whose `tensors` is the number of tensors compared. Its findings' codes: `missing`, `unexpected`, `shape`, `kind`,
        `load`, `device`, `differs`, `checksum`, `reader`, `forward` (errors), `non-finite` (a warning, or an error with `finite` and in
        outputs), `output` (a warning), `tied`, `hook`, `dtype`, `meta`, `no-forward` (notes).

    Raises:
        DeviceError: this machine does not have the device.
        ModelError: an input's text is malformed.
        TargetError, FormatError: the model can't be built, or has tensors that no checkpoint can hold.
    """
    torch_device = check_device(device)
    for text in inputs:
        forward.parse_input(text)
    model = user_code.call(checkpoint.path, model_builder)
    if torch_device.type == "meta":
        return _by_names(checkpoint, model, device, bool(inputs), conversions)
    record = _fresh(checkpoint)
    try:
        user_code.call(checkpoint.path, model.to, torch_device)
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
            read = loading.reader(checkpoint, as_read, read)
            loaded = loading.load_by_library(model, checkpoint, skeleton, as_read, read)
    findings = list(loaded.findings)
    findings += _readers_agree(checkpoint, loaded) if loaded.complete else []
    compared = 0
    if loaded.complete:
        by_torch = _ByTorch(as_read.checkpoint, model_builder, read)
        compared, differing = _read_back(as_read.checkpoint, model, loaded, read, finite, by_torch)
        findings += differing
    outputs: dict[str, tuple[int, ...]] = {}
    if inputs and any(finding.level == "error" and finding.code != "non-finite" for finding in findings):
        findings.append(Finding("no-forward", "no forward pass was run, since the checkpoint did not load", level="note"))
    elif inputs:
        outputs, output_findings = forward.run(model, inputs, torch_device, checkpoint.path)
        findings += output_findings
    return Verification(device=device, tensors=compared, findings=tuple(findings), outputs=outputs, fresh=record)


def _by_names(checkpoint: Checkpoint, model: nn.Module, device: str, asked_forward: bool, conversions: bool) -> Verification:
    """The verification on meta: names, shapes and dtypes, by our reader alone."""
    skeleton = checkpoint_of(model, checkpoint.path)
    as_read = read_by_library(checkpoint, skeleton if conversions else replace(skeleton, naming=None))
    taken = probe_file(lambda real=False: model, skeleton, as_read.checkpoint)
    misfits, loaded = fits(as_read.checkpoint, skeleton, taken)
    findings = [*as_read.notes(), *as_read.forgiven(misfits)]
    findings += [Finding("meta", "on meta only names, shapes and dtypes are compared; no value was loaded", level="note")]
    if asked_forward:
        findings.append(Finding("no-forward", "no forward pass was run: there are no values on meta", level="note"))
    findings += [Finding("hook", words, name, "note") for name, words in taken.words()]
    findings += [note for key, meta in loaded.items() for note in readback.dtype_note(key, skeleton[key].dtype, meta.dtype)]
    return Verification(device=device, tensors=len(loaded), findings=tuple(findings), bitwise=False, fresh=_fresh(checkpoint))


def _readers_agree(checkpoint: Checkpoint, loaded: loading.Loaded) -> list[Finding]:
    """Errors for keys that only one of the two readers gives, except names in safetensors' metadata, which only ours gives."""
    official = {key for key, shape in loaded.file_shapes.items() if shape is not None}
    findings = []
    for key in dict.fromkeys((*checkpoint, *official)):
        if key not in checkpoint:
            findings.append(Finding("reader", "the official reader gives this tensor, but ours does not", key))
        elif key not in official and key not in checkpoint.metadata:
            findings.append(Finding("reader", "our reader gives this tensor, but the official one does not", key))
        elif key in official and checkpoint[key].shape != loaded.file_shapes[key]:
            shapes = f"{checkpoint[key].shape}, and the official one {loaded.file_shapes[key]}"
            findings.append(Finding("reader", f"our reader gives the shape {shapes}", key))
    return findings


def _read_back(
    checkpoint: Checkpoint, model: nn.Module, loaded: loading.Loaded, read: Read, finite: bool, by_torch: _ByTorch
) -> tuple[int, list[Finding]]:
    """The number of tensors compared, and the findings, with one tensor in memory at a time."""
    compared, findings = 0, []
    state = state_dict_of(model, checkpoint.path)
    changing = {key for loader in changing_loaders(model, state).values() for key in loader.keys}
    pairs = [(key, value, checkpoint.get(loaded.aliases.get(key, key))) for key, value in state.items() if isinstance(value, torch.Tensor)]
    with phase("comparing", sum(meta.nbytes for _, _, meta in pairs if meta is not None)) as advance:
        for key, value, meta in pairs:
            if meta is None or meta.shape != tuple(value.shape):
                continue
            compared += 1
            try:
                data = read(meta)
            except FormatError as error:
                findings.append(Finding("checksum", error.reason, key))
                continue
            differing = readback.compare(key, meta, value, data, finite)
            if key in changing and any(finding.code == "differs" for finding in differing):
                differing = by_torch.compare(key, value, finite)
            findings += differing
            advance(meta.nbytes)
    return compared, findings


@dataclass
class _ByTorch:
    """The reference for values that loading code changes: what torch loads into another fresh model from the bytes that our reader
    gives."""

    checkpoint: Checkpoint
    build: Callable[[], nn.Module]
    read: Read
    state: Mapping[str, Any] | None = None

    def compare(self, key: str, value: torch.Tensor, finite: bool) -> list[Finding]:
        """The findings of `readback.compare`, and a note that another reference was used."""
        if self.state is None:
            self.state = self._load()
        expected = self.state[key]
        meta = TensorMeta(key, code_of(expected), tuple(expected.shape), contiguous_stride(tuple(expected.shape)))
        note = Finding(
            "hook", "is changed by the model's own loading code, so it is compared with what torch loads, not with the file", key, "note"
        )
        return [note, *readback.compare(key, meta, value, tensor_bytes(expected), finite)]

    def _load(self) -> Mapping[str, Any]:
        path, checkpoint = self.checkpoint.path, self.checkpoint
        model = user_code.call(path, self.build)
        own = state_dict_of(model, path)
        loaders = changing_loaders(model, own)
        keys = reachable_keys(own, loaders)
        values = {
            key: tensor_from(self.read(meta), meta.dtype).view(meta.shape)
            for key, meta in checkpoint.items()
            if key in keys or key not in own
        }
        versions = {module_path: metadata for module_path, metadata in checkpoint.module_metadata.items() if module_path in loaders}
        extra = {key: value for key, value in checkpoint.entries.items() if not isinstance(value, Refused)}
        load(model, own, values, extra, loaders, versions, [key for key in checkpoint if key not in values])
        return state_dict_of(model, path)


def _fresh(checkpoint: Checkpoint) -> tuple[str, ...] | None:
    recorded = (checkpoint.provenance or {}).get("fresh")
    return tuple(str(key) for key in recorded) if isinstance(recorded, (list, tuple)) else None


def check_device(device: str) -> torch.device:
    """The device, if this machine has it; `meta` always exists.

    Raises:
        DeviceError: the text names no device, or this machine or build of torch does not have it. The hint lists the available ones.

    >>> check_device("cpu")
    device(type='cpu')
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"{device!r} is not the name of a device", hint=_hint()) from error
    if parsed.type == "meta":
        return parsed
    try:
        torch.empty(1, device=parsed)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DeviceError(f"this machine has no device {device!r} ({reason[:200]})", hint=_hint()) from error
    return parsed


def available_devices() -> tuple[str, ...]:
    """The names of the available devices: `cpu`, `meta`, and torch's accelerators with their numbers."""
    accelerators = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    accelerators += ["mps"] if torch.backends.mps.is_available() else []
    accelerators += [f"xpu:{index}" for index in range(torch.xpu.device_count())] if torch.xpu.is_available() else []
    return ("cpu", "meta", *accelerators)


def _hint() -> str:
    return " or ".join(f"device={name!r}" for name in available_devices())
