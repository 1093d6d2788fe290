"""The fuzzers' seed corpus: one small honest file of each kind, made by code and by the official libraries. None is kept on disk."""

from __future__ import annotations

import json
import pickle
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch

import ckptsurgeon as cs
from ckptsurgeon.formats.plain import skeleton
from ckptsurgeon.planning import planfile

Seeds = Mapping[str, bytes]
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


def _saved(value: Any, **choices: Any) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer, **choices)
    return buffer.getvalue()


def network() -> torch.nn.Module:
    """A model of two layers, two weights of which are one tensor."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    net[2].weight = net[0].weight
    return net


def _training() -> dict[str, Any]:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "epoch": 1}


@lru_cache
def _values() -> dict[str, Any]:
    weight = torch.arange(6.0)
    views = {"whole": weight, "tied": weight, "slice": weight[1:3], "rows": weight.view(2, 3).t(), "wide": weight[:1].expand(4)}
    odd = {
        "a": torch.nn.Parameter(torch.ones(2)),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "number": numpy.float64(2),
        "array": numpy.ones(2),
        "list": [{"x": torch.ones(1)}, (1, "two", None, b"three")],
        7: "seven",
        ("a", 1): 1.5,
        "m._extra_state": {"version": 3, "bytes": b"\xff\0"},
    }
    number, other = torch.tensor([[1 + 2j, 3 - 4j]]), torch.tensor([5 + 6j])
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.partition_dim = 0  # type: ignore[attr-defined]
    lazy = {"conj": number.conj(), "adjoint": number.mH, "imag": other.conj().imag, "plain": number, "attributed": attributed}
    flat = OrderedDict((f"layer{index}.weight", torch.full((2,), float(index))) for index in range(3))
    return {
        "flat": flat,
        "views": views,
        "dtypes": {str(dtype): torch.ones(2).to(dtype) for dtype in DTYPES},
        "odd": odd,
        "lazy": lazy,
        "nested": {"ema": {"a.b": weight, "a": {"c": weight}}, "model": {"module": network().state_dict()}},
        "training": _training(),
    }


def _rewritten(raw: bytes, method: int = zipfile.ZIP_STORED, stream: bool = False) -> bytes:
    """The same zip by Python's zipfile: deflated, or written to what can't seek, so with data descriptors."""

    class Pipe(BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

    out = Pipe() if stream else BytesIO()
    with zipfile.ZipFile(BytesIO(raw)) as old, zipfile.ZipFile(out, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return out.getvalue()


def _arrays(save: Callable[..., None]) -> bytes:
    """NumPy's zip of arrays, in both orders of memory."""
    out = BytesIO()
    save(out, w=numpy.arange(6, dtype="f4").reshape(2, 3), turned=numpy.asfortranarray(numpy.ones((3, 2), "i8")), one=numpy.float64(1))
    return out.getvalue()


@lru_cache
def zip_files() -> Seeds:
    """torch's zip format, and NumPy's."""
    seeds = {name: _saved(value) for name, value in _values().items()}
    flat = seeds["flat"]
    return {
        **seeds,
        "protocol 4": _saved(_values()["odd"], pickle_protocol=4),
        "deflated": _rewritten(flat, zipfile.ZIP_DEFLATED),
        "stream": _rewritten(flat, stream=True),
        "arrays": _arrays(numpy.savez),
        "deflated arrays": _arrays(numpy.savez_compressed),
    }


@lru_cache
def legacy_files() -> Seeds:
    """The format before torch 1.6, and what pickle.dump writes."""
    seeds = {name: _saved(value, _use_new_zipfile_serialization=False) for name, value in _values().items()}
    return {**seeds, "plain": pickle.dumps({"w": numpy.ones(2), "b": [1, 2.5, "x"]}, 2), "plain 5": pickle.dumps({"w": torch.ones(2)}, 5)}


@lru_cache
def training_files() -> Seeds:
    """Training checkpoints, in both of torch's formats."""
    value = _training()
    wrapped = {"state_dict": {f"module.{key}": one for key, one in value["model"].items()}, "optimizer_states": [value["optimizer"]]}
    return {"plain": _saved(value), "legacy": _saved(value, _use_new_zipfile_serialization=False), "wrapped": _saved(wrapped)}


@lru_cache
def safetensors_files() -> Seeds:
    """By the official library."""
    plain = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2).half(), "n": torch.arange(2), "none": torch.empty(0, 3)}
    dtypes = {f"t{index}": torch.ones(2).to(dtype) for index, dtype in enumerate(DTYPES) if not dtype.is_complex}
    return {
        "plain": safetensors.torch.save(plain),
        "metadata": safetensors.torch.save(plain, {"format": "pt", "ckptsurgeon": '{"version": 1, "tool": "x", "fresh": ["n"]}'}),
        "dtypes": safetensors.torch.save(dtypes),
        "empty": safetensors.torch.save({}),
    }


SHARDS = ("one.safetensors", "two.bin", "three.json")


@lru_cache
def shards() -> Seeds:
    """The files that lie beside an index."""
    one = safetensors.torch.save({"a": torch.ones(2), "b": torch.ones(1)})
    return {SHARDS[0]: one, SHARDS[1]: _saved({"c": torch.ones(2)}), SHARDS[2]: b'{"weight_map": {"a": "patient"}}'}


@lru_cache
def json_files() -> Seeds:
    """Skeletons and indexes of shards."""
    seeds = {}
    for name, model in (("net", network()), ("conv", torch.nn.Conv2d(1, 2, 3))):
        seeds[name] = json.dumps(skeleton.to_json(cs.skeleton(model))).encode()
    index = {"metadata": {"total_size": 12}, "weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}}
    return {**seeds, "index": json.dumps(index).encode(), "index of one": json.dumps({"weight_map": {"c": SHARDS[1]}}).encode()}


SOURCE, OTHER = "source.pt", "other.safetensors"  # what the plans read, in the folder where they lie


@lru_cache
def plan_sources() -> Seeds:
    """The files that a plan reads."""
    source = {"module.fc.weight": torch.arange(12.0).view(4, 3), "module.fc.bias": torch.ones(4), "qkv": torch.arange(12.0).view(6, 2)}
    other = {
        "fc.weight": torch.zeros(4, 3),
        "fc.bias": torch.zeros(4),
        "q": torch.zeros(2, 2),
        "k": torch.zeros(2, 2),
        "new": torch.zeros(2),
    }
    return {SOURCE: _saved(source), OTHER: safetensors.torch.save(other)}


def lay_plan_sources(folder: Path) -> None:
    """Write what a plan reads."""
    for name, raw in plan_sources().items():
        (folder / name).write_bytes(raw)


@lru_cache
def plan_files() -> Seeds:
    """plan.json of several kinds; paths are relative, so that they hold in any folder that has `plan_sources`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_plan_sources(folder)
        source, other = folder / SOURCE, folder / OTHER
        (folder / "split.toml").write_text(
            '[[adapt]]\nfrom = "qkv"\nto = ["q", "k"]\nop = "slice(dim=0, start=0, stop=4) | chunk(dim=0)"\n'
        )
        plans = {
            "convert": cs.plan(source),
            "kept": cs.plan(source, other),
            "split": cs.plan(source, other, rules=folder / "split.toml"),
            "half": cs.plan(source, dtype="F16"),
            "adapted": cs.plan(source, adapt={"qkv": "slice(dim=0, start=0, stop=2)"}, drop=["module.fc.bias"]),
            "init": cs.plan(source, other, init={"new": "normal(0, 0.02)"}),
        }
        raw = {name: json.dumps(planfile.to_json(one)) for name, one in plans.items()}
        return {name: text.replace(f"{folder}/", "").encode() for name, text in raw.items()}


@lru_cache
def rule_files() -> Seeds:
    """Rules, one file of each kind."""
    texts = {
        "rename": '[[rename]]\nfrom = "module.{**rest}"\nto = "{rest}"\n\n[[drop]]\nkey = "qkv"\n',
        "numbers": '[[rename]]\nfrom = "h.{i}.{p}"\nto = "layers.{i+1}.{p}"\n[[keep]]\nkey = "head.{weight,bias}"\n',
        "adapt": '[[adapt]]\nfrom = "qkv"\nto = ["q", "k"]\nop = "slice(dim=0, start=0, stop=4) | chunk(dim=0)"\n',
        "stages": '# two stages\n[[rename]]\nfrom = "fc.{a}"\nto = "x.{a}"\n\n[[stage]]\n\n[[rename]]\nfrom = "x.{a}"\nto = "fc.{a}"\n',
        "init": "[[init]]\nkey = 'new'\nscheme = \"normal(0, 0.02)\"\n[[init]]\nkey = \"{q,k}\"\nscheme = 'zeros'\n",
    }
    return {name: text.encode() for name, text in texts.items()}


@lru_cache
def pattern_texts() -> Seeds:
    """A pattern, a result and a key, a line each."""
    rows = [
        ("layers.{i}.{**rest}", "h.{i+1}.{rest}", "layers.3.attn.q.weight"),
        ("**.{a}_{b}.*", "{a}.{b}", "x.y.one_two.weight"),
        ("fc{n}.{weight,bias}", "{n*2-1}.w", "fc12.bias"),
        ("block.{0..31}.**", "b", "block.7.conv.1.weight"),
        ("*a*a*a.{x}", "{x}{x}", "aaaaaaaaaaaaaaaaaaaaaaaa.b"),
    ]
    return {row[0]: "\n".join(row).encode() for row in rows}


@lru_cache
def label_files() -> Seeds:
    """Lists of tokens, in each of their forms."""
    tokens = ["[PAD]", "the", "##ing", "é", "\ue000"]
    numbered = {token: index for index, token in enumerate(tokens)}
    tokenizer = {"model": {"vocab": numbered}, "added_tokens": [{"content": "<new>", "id": 5}, {"content": "the", "id": 1}]}
    unigram = {"model": {"vocab": [[token, -1.5] for token in tokens]}}
    config = {"id2label": {str(row): token for token, row in numbered.items()}, "label2id": numbered}
    values = {"list": tokens, "vocab": numbered, "tokenizer": tokenizer, "unigram": unigram, "config": config}
    return {**{name: json.dumps(one).encode() for name, one in values.items()}, "lines": "\n".join(tokens).encode()}


READERS: Mapping[str, Callable[[], Seeds]] = {
    "zip": zip_files,
    "legacy": legacy_files,
    "training": training_files,
    "safetensors": safetensors_files,
    "json": json_files,
    "planfile": plan_files,
    "rulefile": rule_files,
    "patterns": pattern_texts,
    "labels": label_files,
}
