"""The contract that every reader keeps for any bytes: a Checkpoint, or a CheckpointError, nothing else; within 2 s and 200 MB.

One function for each kind of thing that comes from strangers, called by atheris, by hypothesis and on the files of `found/`. It goes
through what a person uses: opening, looking, `check`, a diff with itself, a conversion, and the official libraries' reading of that.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any

import fuzz_seeds
import jsonschema
import numpy
import safetensors
import safetensors.torch
import torch

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats.archive_tree import read_tree
from ckptsurgeon.formats.labels import read_labels
from ckptsurgeon.optimizer import format as optimizer_saved
from ckptsurgeon.planning import planfile
from ckptsurgeon.rules import rulefile
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.rules.rules import compile_rules
from ckptsurgeon.rules.templates import check_template, expand
from ckptsurgeon.tensors import Archive, Checkpoint, Refused
from ckptsurgeon.views import json as views_json

SECONDS, MEGABYTES = 2.0, 200
STUCK = 20.0  # CPU seconds after which an input is given up
SMALL = 1 << 16  # bytes of tensors that are converted too
CODE = re.compile(r"CK[1-5]\d\d")


class Broken(AssertionError):
    """An input that is answered, but costs too much, or whose answer is wrong."""


class Stuck(BaseException):
    """An input that would run on; no `except` of the product may catch it."""


def _stuck(_signal: int, _frame: FrameType | None) -> None:
    raise Stuck(f"more than {STUCK} s")


@contextmanager
def bounded(memory: bool = True) -> Iterator[None]:
    """Fails where the block takes more CPU time or memory (asked for at once) than an input may cost."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    alarm = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGPROF, _stuck) if alarm else None
    if alarm:
        signal.setitimer(signal.ITIMER_PROF, STUCK)
    began = time.process_time()
    try:
        if memory:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + (MEGABYTES << 20), hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if alarm:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
    spent = time.process_time() - began
    if spent > SECONDS:
        raise Broken(f"took {spent:.1f} s")


def expect(holds: object, what: str) -> None:
    """Raise `Broken` with `what` unless it holds."""
    if not holds:
        raise Broken(what)


def _lines(text: str) -> None:
    expect(all(line.isprintable() for line in text.split("\n")), f"shows what is not printable: {text!r:.200}")


@lru_cache
def _schema(name: str) -> Any:
    schema = json.loads((files("ckptsurgeon") / "views" / "schemas" / f"{name}.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def _data(name: str, value: Mapping[str, Any]) -> None:
    """The JSON that a program reads: valid for its schema, and ASCII, whatever the file's names are."""
    text = json.dumps(value, indent=2, ensure_ascii=True)
    again = json.loads(text)
    if len(text) < 20_000:
        wrong = next(iter(_schema(name).iter_errors(again)), None)
        expect(wrong is None, f"{name} --json is not as its schema says: {wrong}")


def refused(error: CheckpointError, path: Path | None = None) -> str:
    """A refusal that can be shown; `path` is the file that it should name."""
    _lines(str(error))
    expect(error.reason and (path is None or error.path), f"a refusal without reason or path: {error!r}")
    _data("error", views_json.error(error))
    return "refused"


def _spans(archive: Archive) -> None:
    """Every tensor lies within its file."""
    sizes = {stamp.path: stamp.size for stamp in archive.files}
    for state_dict in archive.state_dicts:
        for name, meta in state_dict.tensors.items():
            expect(len(meta.shape) == len(meta.stride), f"{name} has another number of strides than of dims")
            span = meta.span
            if span is not None and span.nbytes:
                room = sizes[span.file] if span.packed is None else span.packed.size
                expect(span.offset >= 0 and span.offset + span.nbytes <= room, f"{name} lies beyond its file")
                if span.packed is not None:
                    expect(span.packed.offset + span.packed.nbytes <= sizes[span.file], f"{name} is packed beyond its file")


def _views(archive: Archive) -> None:
    for verbose, width in ((False, None), (True, None), (False, 80)):
        _lines(archive.to_text(verbose=verbose, width=width))
    _data("inspect", views_json.archive(archive))


def checkpoint(data: bytes, folder: Path) -> str:
    """A file that says it is a checkpoint."""
    path = folder / "patient"
    path.write_bytes(data)
    with bounded():
        report = cs.check(path)
        _lines(report.to_text(verbose=True))
        _data("check", views_json.check(report))
        findings = report.files[0].findings
        expect(all(CODE.fullmatch(one.code) for one in findings), f"a finding without a code: {findings}")
        try:
            archive = cs.inspect(path)
        except CheckpointError as error:
            expect(not report.ok, "check passes what can't be read")
            return refused(error, path)
        _spans(archive)
        _views(archive)
    stand_ins = any(isinstance(one, Refused) for root in archive.state_dicts for one in root.entries.values())
    expect(report.ok is not (bool(archive.globals) or stand_ins), "check does not say what inspect says")
    if sum(root.nbytes for root in archive.state_dicts) < SMALL:
        with bounded(memory=False):  # all that can be asked of the data too
            whole = cs.check(path, full=True, finite=True, jobs=1)
            _data("check", views_json.check(whole))
            expect(report.ok or not whole.ok, "what is not good is good when more is asked")
    for state_dict in archive.state_dicts[:3]:
        with bounded():
            found = cs.open(path, root=state_dict.root)
            expect(list(found) == list(state_dict.tensors), f"opens another root than {state_dict.root!r}")
            difference = cs.diff(found, found)
            differs = {*difference.missing, *difference.extra, *difference.mismatched, *difference.dtype_changed}
            expect(differs <= set(difference.refused or ()) and (difference.same or difference.refused), "differs from itself")
            for verbose, width in ((False, None), (True, 80)):
                _lines(difference.to_text(verbose=verbose, width=width))
            _data("diff", views_json.diff(difference))
        if found and found.nbytes < SMALL and len(found) < 50 and found.format != "skeleton":
            converted(path, found, folder)
    return "read"


def official(path: Path, found: Checkpoint) -> Mapping[str, Any] | None:
    """What torch, safetensors or NumPy reads from the file, where they do: the state_dict itself."""
    if found.format == "safetensors":
        return safetensors.torch.load(path.read_bytes())
    if found.format == "npz":
        try:
            with numpy.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in found}
        except Exception:  # noqa: BLE001 another library's reader of bytes that are not sound
            return None
    if found.root or not found.format.startswith("torch-") or found.format == "torch-shards":
        return None
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 another library's reader of bytes that are not sound
        return None
    return value if isinstance(value, Mapping) else None


def converted(path: Path, found: Checkpoint, folder: Path) -> None:
    """Written as safetensors, read by that library, and held against what torch reads from the file itself."""
    out = folder / "out.safetensors"
    with bounded(memory=False):
        try:
            cs.merge([path], None, out, root=found.root, overwrite=True)
        except CheckpointError as error:
            refused(error)
            return
        written = safetensors.torch.load(out.read_bytes())
    expect(written.keys() == found.keys(), "a conversion has other names")
    theirs = official(path, found)
    if theirs is None or any(type(key) is not str for key in theirs):  # what is no text is told as text
        return
    for name, tensor in written.items():
        other = theirs.get(name)
        if not isinstance(other, torch.Tensor):
            raise Broken(f"{name} is no tensor to the official library")
        same = tensor.dtype == other.dtype and tensor.shape == other.shape and _bits(tensor) == _bits(other)
        expect(same, f"{name} has other values than the official library reads")


def _bits(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
    return dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""


def shards(data: bytes, folder: Path) -> str:
    """JSON beside shards: an index, a skeleton, or neither."""
    for name, raw in fuzz_seeds.shards().items():
        if not (folder / name).exists():
            (folder / name).write_bytes(raw)
    return checkpoint(data, folder)


def training(data: bytes, folder: Path) -> str:
    """A training checkpoint: whole as a tree, each optimizer's state in it, and put into a live model and optimizer."""
    path = folder / "patient"
    path.write_bytes(data)
    with bounded():
        try:
            tree = read_tree(str(path))
        except CheckpointError as error:
            return refused(error, path)
        for value in _states(tree.value):
            try:
                saved = optimizer_saved.read_saved(value)
                for position in saved.flat:
                    saved.shape_of(position)
            except CheckpointError as error:
                refused(error)
    model = fuzz_seeds.network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with bounded(memory=False):
        before = {name: one.clone() for name, one in model.state_dict().items()}
        try:
            report = cs.transfer(path, model, optimizer=optimizer)
        except CheckpointError as error:
            expect(all(torch.equal(before[name], one) for name, one in model.state_dict().items()), "a refused transfer changed the model")
            expect(not optimizer.state, "a refused transfer changed the optimizer")
            return refused(error)
        _lines(str(report))
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
    return "read"


def _states(value: Any) -> Iterator[Any]:
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or not isinstance(one, (Mapping, list, tuple)):
            continue
        seen.add(id(one))
        if isinstance(one, Mapping) and "state" in one and "param_groups" in one:
            yield one
        waiting += list(one.values()) if isinstance(one, Mapping) else list(one)


@lru_cache
def _plain_sources(folder: Path) -> None:
    fuzz_seeds.lay_plan_sources(folder)


def plan(data: bytes, folder: Path) -> str:
    """A plan.json: read, shown, written again the same, and carried out where it names no code and no file but those it was made for."""
    _plain_sources(folder)
    path = folder / "plan.json"
    path.write_bytes(data)
    with bounded():
        try:
            made = cs.load_plan(path)
        except CheckpointError as error:
            return refused(error, path)
        for verbose, width in ((False, None), (True, 80)):
            _lines(made.to_text(verbose=verbose, width=width))
        value = planfile.to_json(made)
        _data("plan", value)
        again = planfile.from_json(json.dumps(value).encode(), str(path))
        expect(planfile.to_json(again) == value, "a plan is another one when written and read again")
    own = [*made.own_adapters, *(scheme for step in made.steps for scheme in step.schemes if ":" in scheme)]
    named = [source.path for source in made.sources] + ([made.target.spec] if made.target else [])
    if own or not set(named) <= {fuzz_seeds.SOURCE, fuzz_seeds.OTHER} or (made.target and made.target.kind == "model"):
        return "read"
    raw = json.dumps(value).replace(json.dumps(fuzz_seeds.SOURCE), json.dumps(str(folder / fuzz_seeds.SOURCE)))
    path.write_text(raw.replace(json.dumps(fuzz_seeds.OTHER), json.dumps(str(folder / fuzz_seeds.OTHER))))
    with bounded(memory=False):
        try:
            report = cs.apply(path, folder / "out.pt", overwrite=True)
        except CheckpointError as error:
            refused(error)
            return "read"
        _lines(str(report))
    written = torch.load(folder / "out.pt", weights_only=True)
    expect({step.target for step in made.steps} <= written.keys(), "what is written is not what the plan says")
    for step in made.steps:
        expect(tuple(written[step.target].shape) == step.shape, f"{step.target} has another shape than the plan says")
    return "read"


def rules(data: bytes, folder: Path) -> str:
    """A rules file: read, written again the same, and followed. Regular expressions and code of one's own are the person's."""
    _plain_sources(folder)
    path = folder / "rules.toml"
    path.write_bytes(data)
    with bounded():
        try:
            found = cs.load_rules(path)
            compile_rules(found)
        except CheckpointError as error:
            return refused(error)
        texts = [text for rule in found for text in (rule.pattern, rule.result)]
        if not any("/" in text or ":" in text for text in texts):
            written = rulefile.to_toml(found)
            again = rulefile.parse_rules(written, str(path))
            expect(
                [(r.kind, r.pattern, r.result) for r in again] == [(r.kind, r.pattern, r.result) for r in found],
                "rules are others when written",
            )
            try:
                _lines(str(cs.diff(folder / fuzz_seeds.SOURCE, folder / fuzz_seeds.OTHER, rules=path)))
                _lines(str(cs.plan(folder / fuzz_seeds.SOURCE, folder / fuzz_seeds.OTHER, rules=path)))
            except CheckpointError as error:
                refused(error)
    return "read"


def patterns(data: bytes, folder: Path) -> str:
    """A pattern, a result and a key, a line each."""
    pattern, result, key, *_ = (*data.decode("utf-8", "replace").split("\n"), "", "", "")
    if pattern[:1] == "/" == pattern[-1:]:
        return "refused"
    with bounded():
        try:
            compiled = compile_pattern(pattern)
            check_template(result, compiled)
            found = compiled.match(key)
            if found is not None:
                expand(result, found)
            compiled.match(key * 8)
        except CheckpointError as error:
            return refused(error)
    return "read"


def labels(data: bytes, folder: Path) -> str:
    """A list of tokens."""
    path = folder / "tokens"
    path.write_bytes(data)
    with bounded():
        try:
            found = read_labels(path)
        except CheckpointError as error:
            return refused(error, path)
        expect(all(type(one) is str or one is None for one in found), "a token that is no text")
        texts = [one for one in found if one is not None]
        expect(texts and len(set(texts)) == len(texts), "a token twice")
    return "read"


CONTRACTS: Mapping[str, Callable[[bytes, Path], str]] = {
    "zip": checkpoint,
    "legacy": checkpoint,
    "training": training,
    "safetensors": checkpoint,
    "json": shards,
    "planfile": plan,
    "rulefile": rules,
    "patterns": patterns,
    "labels": labels,
}
