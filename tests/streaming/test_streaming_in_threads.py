"""Work in threads: results in order, the first error, and no thread left however the block ends."""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.progress import listening, phase
from ckptsurgeon.streaming import in_threads as module
from ckptsurgeon.streaming.in_threads import SMALL, THREADS, in_threads


@dataclass(frozen=True)
class Part:
    number: int
    nbytes: int = SMALL


def others() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is not threading.current_thread() and "hypothesis" not in thread.name]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = others()
    yield
    assert others() == before


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.sampled_from([0, 5, SMALL - 1, SMALL, 3 * SMALL]), max_size=60))
def test_results_come_in_the_order_of_the_parts(sizes: list[int]) -> None:
    parts = [Part(number, nbytes) for number, nbytes in enumerate(sizes)]

    def work(part: Part) -> int:
        if part.number % 3 == 0:
            time.sleep(0.0002)
        return part.number * part.nbytes

    with in_threads(work, parts) as results:
        assert list(results) == [(part, part.number * part.nbytes) for part in parts]


def test_large_parts_are_worked_on_at_the_same_time_and_small_ones_by_the_caller() -> None:
    together = threading.Barrier(THREADS, timeout=60)

    def work(part: Part) -> str:
        if part.number < THREADS:
            together.wait()  # ends only if as many threads are here at once
        return threading.current_thread().name

    with in_threads(work, [Part(number) for number in range(THREADS)]) as results:
        list(results)
    with in_threads(work, [Part(number, SMALL - 1) for number in range(THREADS, 50)]) as results:
        assert {name for _, name in results} == {threading.current_thread().name}


def test_parts_are_asked_for_a_few_ahead() -> None:
    made = 0

    def parts() -> Iterator[Part]:
        nonlocal made
        for number in range(100):
            made += 1
            yield Part(number)

    with in_threads(lambda part: part.number, parts()) as results:
        for _, number in results:
            assert made <= number + 20


@pytest.mark.parametrize("nbytes", [1, SMALL])
def test_the_error_of_the_first_part_that_fails_is_raised_after_the_results_before_it(nbytes: int) -> None:
    def work(part: Part) -> int:
        if part.number == 7:
            time.sleep(0.05)
        if part.number in (7, 8, 9):
            raise ValueError(part.number)
        return part.number

    got = []
    with pytest.raises(ValueError, match=r"^7$"), in_threads(work, [Part(number, nbytes) for number in range(30)]) as results:
        got.extend(number for _, number in results)
    assert got == list(range(7))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["block", "parts", "listener"])
def test_what_the_caller_raises_ends_the_threads_and_the_rest_is_not_done(error: type[BaseException], where: str) -> None:
    done, slow = [], threading.Event()

    def parts() -> Iterator[Part]:
        for number in range(50):
            if where == "parts" and number == 8:
                raise error
            yield Part(number)

    def work(part: Part) -> None:
        slow.wait(0.01)
        done.append(part.number)

    def listener(progress: object) -> None:
        if where == "listener" and done:
            raise error

    with pytest.raises(error), listening(listener), phase("proving", 50) as advance, in_threads(work, parts()) as results:
        for part, _ in results:
            if where == "block" and part.number == 3:
                raise error
            advance(1)
            time.sleep(0.02)
    assert len(done) < 40


def test_an_interrupt_while_the_threads_end_waits_for_them() -> None:
    begun, ended = threading.Event(), list[int]()

    def work(part: Part) -> None:
        begun.set()
        for _ in range(3):  # while the caller waits
            time.sleep(0.05)
            _thread.interrupt_main()
        ended.append(part.number)

    with pytest.raises(KeyboardInterrupt), in_threads(work, (Part(number) for number in range(2))) as results:
        try:
            list(results)
        except KeyboardInterrupt:
            assert begun.is_set()
            raise
    assert ended


def test_a_listener_hears_that_the_work_goes_on_while_the_caller_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = []
    taken = threading.Event()

    def parts() -> Iterator[Part]:
        yield Part(0)
        assert taken.wait(60)  # by a thread, so that the caller has nothing to help with

    def work(_part: Part) -> None:
        taken.set()
        time.sleep(0.3)

    monkeypatch.setattr(module, "EVERY", 0.01)
    with listening(heard.append), phase("proving", 1), in_threads(work, parts()) as results:
        list(results)
    assert len(heard) > 2


def test_a_system_without_positioned_reads_has_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    here = threading.current_thread()
    with in_threads(lambda part: threading.current_thread() is here, [Part(number) for number in range(9)]) as results:
        assert all(result for _, result in results)
