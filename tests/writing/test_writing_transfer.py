"""`transfer` writes into a live model: interrupted, it leaves it whole; where a file fails under it, the error says how far it came."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from writing_support import environment

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, StaleError, UnreadableError
from ckptsurgeon.models.training.transfer import InFile, Stage
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming import in_threads
from ckptsurgeon.streaming.reading import Read, Reader


def model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(30, 30) for _ in range(5)])


def values(net: nn.Module) -> dict[str, Any]:
    return {key: tensor.tolist() for key, tensor in net.state_dict().items()}


@pytest.fixture(params=[1, 2])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file, read by one thread or by several, none of which is left."""
    if request.param == 2:
        monkeypatch.setattr(in_threads, "SMALL", 1)
        monkeypatch.setattr(copying, "PART", 70)
    torch.save(model(1).state_dict(), tmp_path / "a.pt")
    before = threading.active_count()
    yield tmp_path / "a.pt"
    assert threading.active_count() == before


def at_the_third(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something just before the third tensor is read into the model."""
    real, count = Reader.reads, list[int]()

    def acting(self: Reader, *arguments: Any) -> Iterator[Read]:
        count.append(1)
        if len(count) == 3:
            act()
        return real(self, *arguments)

    patch.setattr(Reader, "reads", acting)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_between_two_copies_waits_until_the_model_is_whole(
    number: signal.Signals, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    def stop(_number: int, _frame: object) -> None:
        raise Stop

    before = signal.signal(number, stop)
    try:
        net = model(2)
        at_the_third(monkeypatch, lambda: signal.raise_signal(number))
        with pytest.raises(Stop):
            cs.transfer(source, net)
        assert values(net) == values(model(1))
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def test_a_keyboard_interrupt_is_one_after_it_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(2)
    at_the_third(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        cs.transfer(source, net)
    assert values(net) == values(model(1))


LOOP = """
import os, random, signal, sys, threading, time
import torch
from torch import nn
import ckptsurgeon as cs
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming import in_threads

path, main = sys.argv[1], threading.main_thread().ident
in_threads.SMALL = copying.PART = int(sys.argv[2])
net = nn.Sequential(*[nn.Linear(60, 60) for _ in range(20)])
olds = [{key: torch.full_like(value, fill) for key, value in net.state_dict().items()} for fill in (0.0,)]
new = torch.load(path, weights_only=True)
whole = {"old": 0, "new": 0}
cs.transfer(path, net)
start = time.perf_counter()
cs.transfer(path, net)
long = time.perf_counter() - start
random.seed(0)
done = 0
while done < 150:
    net.load_state_dict(olds[0])
    timer = threading.Timer(random.random() * long * 1.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    try:
        timer.start()
        try:
            cs.transfer(path, net)
        finally:
            timer.join()
        time.sleep(0.001)
    except KeyboardInterrupt:
        done += 1
    timer.join()
    state = net.state_dict()
    kinds = {"new" if torch.equal(state[key], new[key]) else "old" if torch.equal(state[key], olds[0][key]) else "torn" for key in state}
    assert kinds in ({"old"}, {"new"}), kinds
    whole[kinds.pop()] += 1
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(whole["old"] > 0 and whole["new"] > 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("together", [1000, copying.PART], ids=["several threads", "one"])
def test_interrupts_at_random_moments_never_leave_a_mixture(together: int, tmp_path: Path) -> None:
    torch.save(nn.Sequential(*[nn.Linear(60, 60) for _ in range(20)]).state_dict(), tmp_path / "a.pt")
    command = [sys.executable, "-c", LOOP, str(tmp_path / "a.pt"), str(together)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_in_another_thread_signals_are_left_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = model(2), list[object]()
    at_the_third(monkeypatch, lambda: seen.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=cs.transfer, args=(source, net))
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)] and values(net) == values(model(1))


def test_a_file_that_becomes_shorter_under_it_is_an_error_that_says_how_far_it_came(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(2)
    at_the_third(monkeypatch, lambda: os.truncate(source, 0))  # mapped, it would kill the process by SIGBUS
    with pytest.raises(StaleError) as caught:
        cs.transfer(source, net)
    message, names = str(caught.value), list(net.state_dict())
    count = sum(f"{name}: has its new value" in message for name in names)
    assert message.startswith(
        f"{source}: became shorter while it was read; the model holds {count} of 10 new tensors by now, and perhaps parts of more"
    )
    found, new = values(net), values(model(1))
    have = [name for name in names if found[name] == new[name]]
    assert all(f"{name}: has its new value" in message for name in names[:count]) and set(names[:count]) <= set(have) <= set(names[:2])
    assert (have == names[:2] and count == 2) or copying.PART == 70  # several threads may have begun the third before the second is whole


class Halved(nn.Linear):
    """Loads half of each value, and keeps the version that it was loaded from."""

    loaded = 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] / 2
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.loaded += 1


class Counted(nn.Linear):
    """Has an extra state."""

    count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


@pytest.mark.parametrize("special", [Halved, Counted])
def test_what_took_new_values_before_the_file_fails_takes_the_old_ones_again(
    special: type[nn.Linear], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        net = nn.Sequential(*[nn.Linear(30, 30) for _ in range(3)], special(30, 30))
        net[3].count = seed  # type: ignore[assignment]
        return net

    path = tmp_path / "a.pt"
    torch.save(made(1).state_dict(), path)
    whole, net = made(2), made(2)
    whole.load_state_dict(torch.load(path, weights_only=True))  # the oracle: all of it, by torch
    cs.transfer(path, done := made(2))
    assert values_and_state(done) == values_and_state(whole)
    old, new, plain = values_and_state(net), values_and_state(whole), InFile.into

    def into(value: InFile, tensor: torch.Tensor, stage: Stage) -> Iterator[Read]:
        if len(seen) == 2:
            os.truncate(path, 0)
        seen.append(values_and_state(net))
        return plain(value, tensor, stage)

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(InFile, "into", into)
    with pytest.raises(StaleError, match=r"the model holds 2 of \d new tensors by now, and perhaps parts of more") as caught:
        cs.transfer(path, net)
    assert ("what its own loading code changed in it is undone" in caught.value.reason) == (special is Halved)
    found, marks = values_and_state(net), [key for key in old if key.startswith("3.") or key in ("loaded", "count")]
    assert any(seen[2][key] == new[key] != old[key] for key in marks)  # it had them
    assert all(found[key] == old[key] for key in marks)
    assert all(found[key] == new[key] for key in ("0.weight", "0.bias"))


def values_and_state(net: nn.Sequential) -> dict[str, Any]:
    state = {key: tensor.tolist() for key, tensor in net.state_dict().items() if isinstance(tensor, torch.Tensor)}
    return {**state, "loaded": getattr(net[3], "loaded", 0), "count": net[3].count}


def test_a_disk_that_fails_under_it_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    at_the_third(monkeypatch, lambda: monkeypatch.setattr(os, "preadv", fails))
    with pytest.raises(UnreadableError, match=r"could not be read \(Input/output error\); the model holds [012] of 10 new tensors"):
        cs.transfer(source, model(2))


@pytest.mark.parametrize("change", ["truncated", "touched", "replaced"])
def test_what_can_be_seen_before_the_first_copy_is_seen_before_it(change: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, net = cs.open(source), model(2)
    if change == "truncated":
        os.truncate(source, source.stat().st_size - 1)
    elif change == "touched":
        os.utime(source, ns=(5, 5))
    else:
        torch.save(model(3).state_dict(), source.with_name("new"))
        os.replace(source.with_name("new"), source)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        cs.transfer(found, net)
    assert values(net) == values(model(2))


class Extra(nn.Module):
    """Keeps an extra state, and refuses one that is not to its taste."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.weight, self.word = nn.Parameter(torch.zeros(3)), word

    def get_extra_state(self) -> str:
        return self.word

    def set_extra_state(self, state: str) -> None:
        self.word = state
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_between_extra_states_and_tensors_leaves_no_mixture(tmp_path: Path) -> None:
    given = Extra("new")
    with torch.no_grad():
        given.weight.fill_(1)
    torch.save(given.state_dict(), tmp_path / "a.pt")
    net = Extra("old")
    with pytest.raises(KeyboardInterrupt):
        cs.transfer(tmp_path / "a.pt", net)
    assert (net.word, net.weight.tolist()) == ("new", [1, 1, 1])


class Renamed(nn.Module):
    """Its state_dict has values that are not its memory, so that they go in by its own loading code, which Ctrl-C meets at its end."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), fill))
        self.interrupt = False
        self.register_state_dict_post_hook(self._scale)
        self.register_load_state_dict_post_hook(self._back)

    @staticmethod
    def _scale(module: nn.Module, state: dict[str, Any], prefix: str, _local: object) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2

    @staticmethod
    def _back(module: Any, _incompatible: object) -> None:
        with torch.no_grad():
            module.weight.div_(2)
        if module.interrupt:
            module.interrupt = False
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_in_a_models_own_loading_code_puts_it_back(tmp_path: Path) -> None:
    torch.save(Renamed(1.0).state_dict(), tmp_path / "a.pt")
    net = Renamed(5.0)
    net.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        cs.transfer(tmp_path / "a.pt", net)
    assert (net.weight.tolist(), net.interrupt) == ([5, 5, 5], True)  # its attributes are as they were, too
    net.interrupt = False
    cs.transfer(tmp_path / "a.pt", net)
    assert net.weight.tolist() == [1, 1, 1]


def turned(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.zeros(30, 30).t())


def strided(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.zeros(30, 60)[:, ::2])


def channels_last(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.zeros(1, 30, 1, 30).to(memory_format=torch.channels_last).view(30, 30))


def sliced(net: nn.Sequential) -> None:
    whole = torch.zeros(60, 30)
    net[0].weight, net[1].weight = nn.Parameter(whole[:30]), nn.Parameter(whole[30:])


@pytest.mark.parametrize("lay", [turned, strided, channels_last, sliced])
def test_however_the_model_lies_in_memory(lay: Callable[[nn.Sequential], None], source: Path) -> None:
    net = model(2)
    lay(net)
    before = {name: (one.data_ptr(), one.stride()) for name, one in net.named_parameters()}
    cs.transfer(source, net)
    assert values(net) == values(model(1))
    assert {name: (one.data_ptr(), one.stride()) for name, one in net.named_parameters()} == before


def test_autograd_learns_that_the_weights_have_changed(source: Path) -> None:
    net = model(2)
    loss = net(torch.ones(1, 30)).square().sum()
    cs.transfer(source, net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
)
def test_every_kind_of_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            for name, one in (("many", value), ("none", value[:0]), ("one", value[0])):
                self.register_buffer(name, one.clone())

    given = torch.randn(7, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype)
    torch.save(Holder(given).state_dict(), tmp_path / "a.pt")
    net = Holder(torch.zeros(7).to(dtype))
    cs.transfer(tmp_path / "a.pt", net)
    assert values(net) == values(Holder(given))


FLAT = """
import sys, torch
from torch import nn
import ckptsurgeon as cs
net = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(50)])
cs.transfer(sys.argv[2], nn.Linear(3, 3))
def resident():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(rows["VmHWM"].split()[0]) // 1024
before = resident()
cs.transfer(sys.argv[1], net)
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is told by /proc")
def test_memory_stays_flat(tmp_path: Path) -> None:
    torch.save(nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(50)]).state_dict(), tmp_path / "a.pt")
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "b.pt")
    command = [sys.executable, "-c", FLAT, str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == 0 and int(done.stdout) < 30, done  # of 200 MB
