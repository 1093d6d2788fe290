"""How far the work is, as a callback and in a log: which phases, how many events, and what becomes of a callback that raises."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon import progress
from ckptsurgeon.progress import Progress, listening, phase, raising_later
from ckptsurgeon.storage import copying

WIDE = 1 << 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, WIDE, bias=False)


NBYTES = 2 * WIDE * WIDE * 4


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of 8 MiB, a half-precision one, and small pieces, so that there are many events."""
    monkeypatch.chdir(tmp_path)
    state = Net().state_dict()
    torch.save(state, "a.pt")
    safetensors.torch.save_file(state, "a.safetensors")
    safetensors.torch.save_file({key: value.half() for key, value in state.items()}, "half.safetensors")
    safetensors.torch.save_file({key.replace("one", "first"): value for key, value in state.items()}, "other.safetensors")
    monkeypatch.setattr(copying, "AT_ONCE", 1 << 20)
    monkeypatch.setattr(copying, "BUFFER", 1 << 20)
    monkeypatch.setattr(copying, "PART", 1 << 20)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return tmp_path


Verb = Callable[..., Any]
# By verb, a call of it, and the phases that it has, in order, with unit and total.
CALLS: dict[str, tuple[Verb, list[tuple[str, str, int | None]]]] = {
    "merge": (
        lambda **more: cs.merge("a.safetensors", None, "out.pt", overwrite=True, **more),
        [("writing", "bytes", NBYTES), ("proving", "bytes", NBYTES)],
    ),
    "merge with a cast": (
        lambda **more: cs.merge("half.safetensors", None, "out.safetensors", dtype="F32", overwrite=True, **more),
        [("writing", "bytes", NBYTES), ("proving", "bytes", NBYTES)],
    ),
    "merge into a model": (
        lambda **more: cs.merge("a.pt", Net(), "out.safetensors", overwrite=True, **more),
        [("writing", "bytes", NBYTES), ("proving", "bytes", NBYTES), ("loading", "bytes", NBYTES), ("comparing", "bytes", NBYTES)],
    ),
    "merge by matching": (
        lambda **more: cs.merge("other.safetensors", "a.pt", "out.safetensors", match=True, overwrite=True, **more),
        [("matching", "tensors", 2), ("writing", "bytes", NBYTES), ("proving", "bytes", NBYTES)],
    ),
    "apply": (
        lambda **more: cs.apply(cs.plan("a.safetensors"), "out.safetensors", overwrite=True, **more),
        [("writing", "bytes", NBYTES), ("proving", "bytes", NBYTES)],
    ),
    "plan by matching": (lambda **more: cs.plan("other.safetensors", "a.pt", match=True, **more), [("matching", "tensors", 2)]),
    "plan in full": (lambda **more: cs.plan("a.pt", full=True, **more), [("reading values", "bytes", None)]),
    "diff that matches": (lambda **more: cs.diff("other.safetensors", "a.pt", **more), [("matching", "tensors", 2)]),
    "match": (lambda **more: cs.match("other.safetensors", "a.pt", **more), [("matching", "tensors", 2)]),
    "match by values": (
        lambda **more: cs.match("other.safetensors", "a.pt", values=True, **more),
        [("matching", "tensors", 2), ("reading values", "bytes", None)],
    ),
    "transfer": (lambda **more: cs.transfer("a.pt", Net(), **more), [("transferring", "bytes", NBYTES)]),
    "transfer with a cast": (
        lambda **more: cs.transfer("half.safetensors", Net(), **more),
        [("converting", "tensors", 2), ("transferring", "bytes", NBYTES)],
    ),
    "verify": (lambda **more: cs.verify("a.pt", Net(), **more), [("loading", "bytes", NBYTES), ("comparing", "bytes", NBYTES)]),
    "verify by names": (
        lambda **more: cs.verify("a.pt", "a.safetensors", finite=True, **more),
        [("reading values", "bytes", NBYTES)],
    ),
    "check": (lambda **more: cs.check(["a.pt", "a.safetensors"], **more), [("checking", "files", 2)]),
    "check in threads": (lambda **more: cs.check(["a.pt", "a.safetensors"], finite=True, jobs=2, **more), [("checking", "files", 2)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_phase_goes_from_nothing_to_all(name: str, files: Path) -> None:
    call, expected = CALLS[name]
    events: list[Progress] = []
    threads = set()

    def listen(event: Progress) -> None:
        threads.add(threading.current_thread())
        events.append(event)

    call(progress=listen)
    events = [event for event in events if event.phase != "waiting for the disk"]  # as long as that takes
    assert list(dict.fromkeys(event.phase for event in events)) == [row[0] for row in expected]
    assert threads == {threading.main_thread()}
    for words, unit, total in expected:
        rows = [event for event in events if event.phase == words]
        assert {event.unit for event in rows} == {unit} and (total is None or {event.total for event in rows} == {total})
        assert rows[0].done == 0 and rows[-1].done == rows[-1].total
        if "values" not in words:  # of which there are two readings, one of each side
            assert [event.done for event in rows] == sorted(event.done for event in rows)


def test_what_moves_many_bytes_tells_of_it_on_the_way(files: Path) -> None:
    events: list[Progress] = []
    cs.merge("a.safetensors", None, "out.pt", progress=events.append)
    for words in ("writing", "proving"):
        assert len([event for event in events if event.phase == words]) >= 8, words


def test_events_are_few(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 3600.0)
    events: list[Progress] = []
    cs.merge("a.safetensors", None, "out.pt", progress=events.append)
    assert [(event.phase, event.done) for event in events if event.phase == "writing"] == [("writing", 0), ("writing", NBYTES)]


class StopError(Exception):
    pass


def stopping(words: str, done: bool) -> Callable[[Progress], None]:
    """What raises at the first event of a phase, or where some of it is done."""

    def listen(event: Progress) -> None:
        if event.phase == words and (event.done > 0) == done:
            raise StopError

    return listen


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("words", ["writing", "proving", "loading", "comparing"])
def test_a_callback_that_raises_stops_a_merge_and_leaves_nothing(words: str, done: bool, files: Path) -> None:
    Path("out.pt").write_bytes(b"what was there")
    before = listing(files)
    with pytest.raises(StopError):
        cs.merge("a.safetensors", Net(), "out.pt", overwrite=True, progress=stopping(words, done))
    assert listing(files) == before and threading.active_count() == 1


@pytest.mark.parametrize("name", [name for name in CALLS if name != "transfer" and "merge" not in name])
def test_a_callback_that_raises_stops_every_verb(name: str, files: Path) -> None:
    call, expected = CALLS[name]
    before = listing(files)
    for words in (row[0] for row in expected if row[0] != "transferring"):
        with pytest.raises(StopError):
            call(progress=stopping(words, False))
    assert listing(files) == before and threading.active_count() == 1


@pytest.mark.parametrize("done", [False, True])
def test_a_callback_that_raises_while_a_model_is_filled_is_raised_once_it_is_whole(done: bool, files: Path) -> None:
    """With the optimizer's state that goes with it."""
    trained = Net()
    optimizer = torch.optim.AdamW(trained.parameters())
    sum(parameter.sum() for parameter in trained.parameters()).backward()
    optimizer.step()
    torch.save({"model": trained.state_dict(), "optimizer": optimizer.state_dict()}, "training.pt")
    model = Net()
    new = torch.optim.AdamW(model.parameters())
    with pytest.raises(StopError):
        cs.transfer("training.pt", model, optimizer=new, progress=stopping("transferring", done))
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert torch.equal(new.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_callback_that_raises_before_a_model_is_filled_leaves_it_as_it_was(files: Path) -> None:
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(StopError):
        cs.transfer("half.safetensors", model, progress=stopping("converting", True))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_workers_of_a_check_are_processes_that_tell_nothing_themselves(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork is sound in a process without torch alone; here the workers touch none."""
    if not hasattr(os, "fork"):
        pytest.skip("needs a fork")
    from ckptsurgeon.api.checking import workers

    monkeypatch.setattr(workers.platform, "may_fork", lambda: True)
    events: list[Progress] = []
    report = cs.check(["a.pt", "a.safetensors", "half.safetensors"], full=True, jobs=2, progress=events.append)
    assert report.ok and [events[0].done, events[-1].done] == [0, 3] and {event.phase for event in events} == {"checking"}
    with pytest.raises(StopError):
        cs.check(["a.pt", "a.safetensors", "half.safetensors"], full=True, jobs=2, progress=stopping("checking", False))


def test_a_wrong_callback_is_refused(files: Path) -> None:
    for wrong in (3, "print", lambda: None, Net):
        with pytest.raises(cs.ArgumentError, match="takes a function of one Progress"):
            cs.check("a.pt", progress=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (Progress("writing", 0, None, "bytes"), "writing"),
        (Progress("checking", 1200, 4000, "files"), "checking 1,200 of 4,000 files"),
        (Progress("checking", 0, 1, "files"), "checking 1 file"),
        (Progress("matching", 0, 24_000, "tensors"), "matching 24,000 tensors"),
        (Progress("reading values", 7, None, "files"), "reading values 7 files"),
    ],
)
def test_an_event_is_a_line(event: Progress, words: str) -> None:
    assert str(event) == words and cs.Progress is Progress
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.done = 1  # type: ignore[misc]


def test_phases_may_stand_within_each_other() -> None:
    told: list[str] = []
    with listening(lambda event: told.append(f"{event.phase} {event.done}")), phase("outer", 2, "files") as advance:
        advance(1)
        with phase("inner"):
            progress.beat()
        progress.beat()
    assert [row for row in dict.fromkeys(told) if row != "outer 1"] == ["outer 0", "inner 0", "outer 2"]
    progress.beat()  # nobody is told any more


def test_what_is_held_is_raised_once_and_only_the_first() -> None:
    calls: list[int] = []

    def listen(event: Progress) -> None:
        calls.append(event.done)
        raise StopError

    done = []
    with pytest.raises(StopError), listening(listen), raising_later() as held:
        with phase("transferring", 2, held=held) as advance:
            advance(1)
            advance(1)
        done.append(True)
    assert done == [True] and calls == [0]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, "ckptsurgeon"):
        yield caplog


def test_phases_are_logged(files: Path, log: pytest.LogCaptureFixture) -> None:
    cs.merge("a.safetensors", None, "out.safetensors")
    rows = [(row.levelname, row.getMessage().split(" after ")[0]) for row in log.records if row.name == "ckptsurgeon"]
    size = str(Progress("", 0, NBYTES, "bytes")).strip()
    kept = [row for row in rows if "disk" not in row[1]]
    assert kept == [("INFO", f"writing {size}"), ("DEBUG", "writing: done"), ("INFO", f"proving {size}"), ("DEBUG", "proving: done")]
    log.clear()
    with pytest.raises(StopError):
        cs.merge("a.safetensors", None, "out.safetensors", overwrite=True, progress=stopping("writing", True))
    assert log.records[-1].getMessage().startswith("writing: stopped after 0.")


def test_nothing_is_printed_or_logged_unasked(files: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    cs.merge("a.safetensors", None, "out.safetensors")
    assert capfd.readouterr() == ("", "") and caplog.records == []
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("ckptsurgeon").handlers)


def test_the_file_is_the_same_whoever_listens(files: Path) -> None:
    cs.merge("a.safetensors", None, "heard.safetensors", progress=lambda event: None)
    cs.merge("a.safetensors", None, "unheard.safetensors")
    assert Path("heard.safetensors").read_bytes() == Path("unheard.safetensors").read_bytes()
