"""Large outputs: bytes that are copied keep the order and the offsets of their sources, modulo 4096, whatever the file system is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.serialization import config

import ckptsurgeon as cs

State = dict[str, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
SUFFIXES = (".pt", ".safetensors")


def tensor(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Random bits, of which each is valid."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


def save(state: State, path: Path) -> Path:
    """Saved by the official library that the suffix names."""
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().view(torch.uint8).numpy().tobytes()


def read_every_way(path: Path, expected: State) -> None:
    """All that the official libraries read of a file, in each of their ways, is equal to `expected`."""
    if path.suffix == ".pt":
        read: list[State] = [torch.load(path, weights_only=True, mmap=mapped) for mapped in (False, True)]
        read.append(torch.load(io.BytesIO(path.read_bytes()), weights_only=True))
        with open(path, "rb") as file:
            read.append(torch.load(file, weights_only=True))
        with config.patch("load.calculate_storage_offsets", True):  # where `.format_version` says that they can be
            read.append(torch.load(path, weights_only=True, mmap=True))
    else:
        read = [load_file(path)]
        with safe_open(path, "pt") as opened:
            read.append({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
            read.append({key: torch.cat([part[:1], part[1:]]) for key in opened.keys() for part in [opened.get_slice(key)]})  # noqa: SIM118
    for state in read:
        assert set(state) == set(expected)
        for key, value in expected.items():
            assert (state[key].dtype, state[key].shape) == (value.dtype, value.shape), key
            assert bits(state[key]) == bits(value), key


def offsets(path: Path) -> dict[str, int]:
    """Where each tensor's bytes begin, in the order of the file."""
    places = {key: meta.span.offset for key, meta in cs.open(path).items() if meta.span is not None}
    return dict(sorted(places.items(), key=lambda place: place[1]))


def network(layers: int = 4, width: int = 321) -> State:
    """Square matrices and vectors, whose sizes are multiples of 8 bytes, and none of 4096."""
    state = {}
    for number in range(layers):
        state[f"layers.{number}.weight"] = torch.randn(width + 1, width + 2)
        state[f"layers.{number}.bias"] = torch.randn(width + 1)
    return state


sizes = st.one_of(st.integers(1, 40), st.sampled_from([16_384, 16_383, 20_001, 65_536, 70_003]))
states = st.lists(st.tuples(st.sampled_from(DTYPES), sizes), min_size=1, max_size=6)


@pytest.mark.parametrize("output", SUFFIXES)
@given(drawn=st.tuples(states, states), suffixes=st.tuples(*[st.sampled_from(SUFFIXES)] * 2), seed=st.integers(0, 99), cast=st.booleans())
@settings(max_examples=examples(8), deadline=None)
def test_any_two_sources(
    output: str, drawn: Any, suffixes: tuple[str, str], seed: int, cast: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("offsets")
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
    states = []
    for side, rows in zip("ab", drawn, strict=True):
        rows = [*rows, (torch.float32, 150_000)]
        named = {f"{side}.{order[number]}": tensor(dtype, count, number) for number, (dtype, count) in enumerate(rows)}
        states.append(named)
    a, b = (save(state, folder / f"{side}{suffix}") for side, state, suffix in zip("ab", states, suffixes, strict=True))
    expected = {f"new.{key}": value for state in states for key, value in state.items()}
    if cast:
        expected = {key: value.to(torch.float64) if value.dtype == torch.bfloat16 else value for key, value in expected.items()}
    target = save({key: torch.zeros_like(value) for key, value in expected.items()}, folder / "target.pt")
    first, twice, second = (folder / f"{name}{output}" for name in ("first", "twice", "second"))
    for path in (first, twice):
        cs.merge([a, b], target, path, rename={"{**key}": "new.{key}"}, provenance=False)
    assert first.read_bytes() == twice.read_bytes()
    cs.merge(first, None, second, provenance=False)
    assert first.read_bytes() == second.read_bytes()
    read_every_way(first, expected)
    for key, offset in offsets(first).items():
        assert offset % (expected[key].itemsize if output == ".safetensors" else min(expected[key].itemsize, 64)) == 0
    if output == ".pt":
        sources = {f"new.{key}": place for path in (a, b) for key, place in offsets(path).items()}
        for key, offset in offsets(first).items():
            large = expected[key].nbytes >= 1 << 16 and not (cast and expected[key].dtype == torch.float64)
            source = sources[key]
            assert offset % 4096 == source % 4096 if large and source % expected[key].itemsize == 0 else offset % 64 == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_renames_keep_the_offsets_of_all_large_tensors(suffix: str, tmp_path: Path) -> None:
    source, out = save(network(), tmp_path / f"a{suffix}"), tmp_path / f"out{suffix}"
    cs.merge(source, None, out, rename={"layers.{i}.{p}": "blocks.{9-i}.{p}"})
    before = {f"blocks.{9 - int(key.split('.')[1])}.{key.split('.')[2]}": place for key, place in offsets(source).items()}
    after = offsets(out)
    large = [key for key in after if key.endswith("weight")]
    assert [(key, after[key] % 4096) for key in large] == [(key, before[key] % 4096) for key in large]
    if suffix == ".safetensors":
        assert list(after) == list(before) and len({(after[key] - before[key]) % 4096 for key in after}) == 1


def test_sources_come_one_after_another_and_most_bytes_decide(tmp_path: Path) -> None:
    a, b = save(network(2), tmp_path / "a.safetensors"), save({f"b.{key}": t for key, t in network(4).items()}, tmp_path / "b.safetensors")
    merged = {**load_file(a), **load_file(b)}
    target, out = save(merged, tmp_path / "target.pt"), tmp_path / "out.safetensors"
    cs.merge([b, a], target, out)
    assert list(offsets(out)) == [*offsets(b), *offsets(a)]
    assert {(place - offsets(b)[key]) % 4096 for key, place in offsets(out).items() if key in offsets(b)} == {0}
    cs.merge([a, b], target, out, overwrite=True)
    assert list(offsets(out)) == [*offsets(a), *offsets(b)]
    assert {(place - offsets(b)[key]) % 4096 for key, place in offsets(out).items() if key in offsets(b)} == {0}
    read_every_way(out, merged)


def test_computed_tensors_stand_before_the_others_or_after(tmp_path: Path) -> None:
    state = {**network(), "half": torch.randn(100).bfloat16(), "odd": torch.randn(3).bfloat16()}
    source, out = save(state, tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    cs.merge(source, None, out, adapt={"layers.1.weight": "transpose"})
    copied = [key for key in offsets(source) if key != "layers.1.weight"]
    assert list(offsets(out)) == ["layers.1.weight", *copied]
    cs.merge(source, None, out, dtype="F16", overwrite=True)  # none is copied: as the official library does it
    again = save(load_file(out), tmp_path / "again.safetensors")
    assert list(offsets(out)) == list(offsets(again))


def test_an_odd_tensor_that_would_move_wider_ones_off_their_alignment_comes_last(tmp_path: Path) -> None:
    a = save({"odd": torch.randn(3).bfloat16(), "even": torch.randn(300_000).bfloat16()}, tmp_path / "a.safetensors")
    b = save({"wide": torch.randn(300_000)}, tmp_path / "b.safetensors")
    target = save({**load_file(a), **load_file(b)}, tmp_path / "target.pt")
    cs.merge([a, b], target, tmp_path / "out.safetensors")
    assert list(offsets(tmp_path / "out.safetensors")) == ["even", "wide", "odd"]


def test_small_outputs_are_laid_out_as_ever(tmp_path: Path) -> None:
    state = {"b": torch.randn(1000), "a": torch.randn(1000)}
    source = save(state, tmp_path / "a.pt")
    cs.merge(source, None, tmp_path / "out.safetensors", provenance=False)
    save_file(state, tmp_path / "official.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "official.safetensors").read_bytes()
    cs.merge(source, None, tmp_path / "out.pt")
    assert all(place % 64 == 0 for place in offsets(tmp_path / "out.pt").values())


@pytest.mark.parametrize("tied", ["copy", "alias"])
def test_the_second_of_two_tied_keys_moves_none_of_the_others(tied: str, tmp_path: Path) -> None:
    state = network()
    state["tied"] = state["layers.0.weight"]
    source, out = save(state, tmp_path / "a.pt"), tmp_path / "out.safetensors"
    cs.merge(source, None, out, tied=tied)
    order = [key for key in offsets(out) if key != "tied"]
    assert order == [key for key in offsets(source) if key != "tied"]
    assert (next(iter(offsets(out))) == "tied") == (tied == "copy")


def test_joined_and_split_tensors_follow_their_sources(tmp_path: Path) -> None:
    state = {f"{name}.weight": torch.randn(161, 322) for name in "qkvo"}
    source, joined, split = (tmp_path / f"{name}.safetensors" for name in ("source", "joined", "split"))
    save(state, source)
    rule = tmp_path / "rules.toml"
    rule.write_text('[[adapt]]\nfrom = "q.weight + k.weight + v.weight"\nto = "qkv.weight"\nop = "concat"\n')
    cs.merge(source, None, joined, rules=[rule])
    expected = {"qkv.weight": torch.cat([state[f"{name}.weight"] for name in "qkv"]), "o.weight": state["o.weight"]}
    read_every_way(joined, expected)
    first, second = sorted(("o.weight", "q.weight"), key=list(offsets(source)).index)
    assert [key.replace("qkv", "q") for key in offsets(joined)] == [first, second]
    cs.merge(joined, None, split, rules=[rule], reverse=True)
    read_every_way(split, state)


def test_shards_follow_their_sources_too(tmp_path: Path) -> None:
    source = save(network(8), tmp_path / "a.safetensors")
    cs.merge(source, None, f"{tmp_path}/out/", max_shard_size="1700KB")
    before = offsets(source)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        if sum(meta.nbytes for meta in cs.open(shard).values()) < 1 << 20:
            continue
        after = offsets(shard)
        assert list(after) == [key for key in before if key in after]
        votes: dict[int, int] = {}
        for key, place in after.items():
            distance = (place - before[key]) % 4096
            votes[distance] = votes.get(distance, 0) + load_file(source)[key].nbytes
        assert max(votes, key=votes.__getitem__) == 0
