"""Tensors that torch conjugates or negates only when they are used: their values are torch's, by every way out and in both formats."""

from __future__ import annotations

from pathlib import Path

import api_support as support
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor, nn

import ckptsurgeon as cs
from ckptsurgeon.errors import FormatError
from ckptsurgeon.streaming.reading import Reader

COMPLEX = (torch.complex64, torch.complex128, torch.complex32)
LEGACY = (False, True)
# What makes a view of a complex matrix; `imag` of a conjugate is a real tensor whose sign is lazy.
VIEWS = {
    "conj": torch.conj,
    "transposed": lambda x: x.mT,
    "adjoint": lambda x: x.mH,
    "rows": lambda x: x[1:],
    "every other": lambda x: x[..., ::2],
    "one row": lambda x: x[:1],
    "flat": lambda x: x.flatten(),
    "expanded": lambda x: x[None].expand(2, *x.shape),
    "Parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "negated": torch._neg_view,
}
ENDS = {"as it is": lambda x: x, "imag": lambda x: x.imag, "real": lambda x: x.real}


def numbers(dtype: torch.dtype, rows: int = 3, columns: int = 4) -> Tensor:
    """Every element another, zeros of both signs and a NaN among them."""
    values = torch.arange(1.0, 2 * rows * columns + 1)
    values[1], values[2], values[5] = 0.0, -0.0, float("nan")
    return torch.complex(values[::2], values[1::2]).reshape(rows, columns).to(dtype)


def resolved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch's own values."""
    return {key: value.resolve_conj().resolve_neg() for key, value in state.items()}


def saved(state: object, path: Path, legacy: bool) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


def loaded(path: Path) -> dict[str, Tensor]:
    return resolved(torch.load(path, weights_only=True))


def storable(state: dict[str, Tensor], legacy: bool) -> dict[str, Tensor]:
    """Without what torch itself can't do: write a complex half in the old format, or resolve both bits of one."""
    return {
        key: value for key, value in state.items() if value.dtype != torch.complex32 or not (legacy or (value.is_conj() and value.is_neg()))
    }


def state_of(dtype: torch.dtype, legacy: bool) -> dict[str, Tensor]:
    """A matrix, and views of it that are lazy in every way; torch does not save one memory as two dtypes."""
    c, other = numbers(dtype), numbers(dtype)
    found = {
        "plain": c,
        "conj": c.conj(),
        "adjoint": c.mH,
        "imag": other.conj().imag,
        "parameter": nn.Parameter(c.conj()),
        "slice": c.mH[1:, ::2],
    }
    return storable(
        {**found, "both": torch._neg_view(c.conj()), "scalar": c[0, 0].conj(), "none": c[:0].conj(), "one": c[1:2].conj()}, legacy
    )


def expected(path: Path, dtype: torch.dtype, legacy: bool) -> dict[str, Tensor]:
    return loaded(saved(state_of(dtype, legacy), path, legacy))


formats = pytest.mark.parametrize("legacy", LEGACY)
dtypes = pytest.mark.parametrize("dtype", COMPLEX, ids=str)


@formats
@dtypes
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
def test_a_merge_writes_the_values(output: str, dtype: torch.dtype, legacy: bool, tmp_path: Path) -> None:
    truth = expected(tmp_path / "in.pt", dtype, legacy)
    kept = {key: value for key, value in truth.items() if output.endswith("pt") or value.dtype not in COMPLEX[1:]}
    report = cs.merge(tmp_path / "in.pt", None, tmp_path / output, drop=[key for key in truth if key not in kept])
    support.same(support.load(tmp_path / output), kept)
    assert dtype in COMPLEX[1:] or any(finding.code == "overlap" for finding in report.findings)  # they shared memory, and no longer do


@formats
@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_any_views_of_one_storage(legacy: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("views")
    dtype = data.draw(st.sampled_from(COMPLEX))
    bases = {"as it is": numbers(dtype)}
    state = {"base": bases["as it is"]}
    for number in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from(sorted(ENDS)))
        view = bases.setdefault(end, numbers(dtype))  # torch does not save one memory as two dtypes
        names = sorted(VIEWS.keys() - ({"negated"} if dtype == torch.complex32 else set()))  # torch can't resolve both bits of it
        for name in data.draw(st.lists(st.sampled_from(names), max_size=5)):
            view = VIEWS[name](view) if view.dim() > 1 or name in ("conj", "rows", "flat", "Parameter", "negated") else view
        if view.numel():
            state[str(number)] = ENDS[end](view)
    state = storable(state, legacy)
    if not state:
        return
    truth = loaded(saved(state, folder / "in.pt", legacy))
    cs.merge(folder / "in.pt", None, folder / "out.pt")
    support.same(torch.load(folder / "out.pt", weights_only=True), truth)


@formats
def test_every_way_in_which_a_reader_gives_bytes(legacy: bool, tmp_path: Path) -> None:
    truth = expected(tmp_path / "in.pt", torch.complex64, legacy)
    found = cs.open(tmp_path / "in.pt")
    with Reader([found]) as reader:
        for key, tensor in truth.items():
            memory = memoryview(bytearray(tensor.numel() * tensor.element_size()))
            for read in reader.reads(found[key], memory):
                read.do()
            given = (bytes(reader.read(found[key])), bytes(memory), b"".join(map(bytes, reader.parts(found[key]))))
            assert given == (support.bits(tensor),) * 3, key


@formats
def test_a_tensor_and_its_conjugate_are_not_tied(legacy: bool, tmp_path: Path) -> None:
    c = torch.tensor([1 + 2j, 3 - 4j])
    r = c.clone()
    state = {"c": c, "conj": c.conj(), "again": c.view(2), "other": c.conj().conj().conj(), "imag": r.imag, "negated": r.conj().imag}
    saved(state, tmp_path / "in.pt", legacy)
    assert cs.open(tmp_path / "in.pt").ties == (("c", "again"), ("conj", "other"))
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    support.same(out, resolved(state))
    assert out["c"].data_ptr() == out["again"].data_ptr() != out["conj"].data_ptr() == out["other"].data_ptr()


def test_a_model_that_ties_what_the_file_conjugates_gets_no_mixture(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
            self.two = self.one

    c = torch.tensor([1 + 2j, 3 - 4j])
    saved({"one": c, "two": c.conj()}, tmp_path / "in.pt", False)
    for source in (tmp_path / "in.pt", {"one": c, "two": c.conj()}):
        with pytest.raises(cs.CheckpointError, match="different values"):
            cs.transfer(source, Tied())


@formats
def test_adapters_and_casts_work_on_the_values(legacy: bool, tmp_path: Path) -> None:
    c = numbers(torch.complex64).nan_to_num()
    r = c.clone()
    state = {"cut": c.conj(), "turned": c.mH, "half": r.conj().imag, "wide": r.conj().imag, "joined.0": c.conj(), "joined.1": c}
    truth = loaded(saved(state, tmp_path / "in.pt", legacy))
    target = {
        "cut": torch.zeros(2, 4, dtype=torch.complex64),
        "turned": torch.zeros(3, 4, dtype=torch.complex64),
        "half": torch.zeros(3, 4, dtype=torch.float16),
        "wide": torch.zeros(3, 4, dtype=torch.float64),
        "joined": torch.zeros(6, 4, dtype=torch.complex64),
    }
    torch.save(target, tmp_path / "target.pt")
    adapt = {"cut": "slice(dim=0, start=0, stop=2)", "turned": "transpose", "joined.0 + joined.1 -> joined": "concat"}
    cs.merge(tmp_path / "in.pt", tmp_path / "target.pt", tmp_path / "out.pt", adapt=adapt)
    wanted = {
        "cut": truth["cut"][:2],
        "turned": truth["turned"].mT,
        "half": truth["half"].half(),
        "wide": truth["wide"].double(),
        "joined": torch.cat([truth["joined.0"], truth["joined.1"]]),
    }
    support.same(torch.load(tmp_path / "out.pt", weights_only=True), wanted)


def test_an_average_is_of_the_values(tmp_path: Path) -> None:
    c = numbers(torch.complex64).nan_to_num()
    saved({"w": c.conj().imag}, tmp_path / "a.pt", False)
    saved({"w": c.conj().real}, tmp_path / "b.pt", True)
    cs.merge([tmp_path / "a.pt", tmp_path / "b.pt"], None, tmp_path / "out.pt", average=True)
    wanted = (loaded(tmp_path / "a.pt")["w"] + loaded(tmp_path / "b.pt")["w"]) / 2
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True)["w"], wanted)


class Complex(nn.Module):
    """Parameters of the shapes and dtypes of a state."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for key, value in state.items():
            self.register_buffer(key, torch.zeros(value.shape, dtype=value.dtype))


@formats
@dtypes
@pytest.mark.parametrize("live", [False, True])
def test_transfer_and_verify_agree_with_load_state_dict(live: bool, dtype: torch.dtype, legacy: bool, tmp_path: Path) -> None:
    state = state_of(dtype, legacy)
    saved(state, tmp_path / "in.pt", legacy)
    truth, model = Complex(state), Complex(state)
    truth.load_state_dict(torch.load(tmp_path / "in.pt", weights_only=True))
    cs.transfer(state if live else tmp_path / "in.pt", model)
    support.same(model.state_dict(), truth.state_dict())
    assert cs.verify(tmp_path / "in.pt", model).ok
    assert cs.verify(tmp_path / "in.pt", tmp_path / "in.pt").ok


def test_a_live_source_is_adapted_and_cast_by_its_values() -> None:
    c = numbers(torch.complex64).nan_to_num()
    state = {"w": c.mH, "narrow": c.conj().imag}
    model = Complex({"w": torch.zeros(3, 4, dtype=torch.complex64), "narrow": torch.zeros(3, 4, dtype=torch.float16)})
    cs.transfer(state, model, adapt={"w": "transpose()"})
    support.same(model.state_dict(), {"w": c.conj().resolve_conj(), "narrow": (-c.imag).half()})


def test_a_lazy_tensor_of_the_model_takes_the_values(tmp_path: Path) -> None:
    source = {"w": numbers(torch.complex64), "v": torch.arange(12.0).reshape(3, 4)}
    torch.save(source, tmp_path / "in.pt")
    for one in (source, tmp_path / "in.pt"):
        model = Complex(source)
        model.w, model.v = torch.zeros(3, 4, dtype=torch.complex64).conj(), torch.zeros(3, 4, dtype=torch.complex64).conj().imag
        assert model.w.is_conj() and model.v.is_neg()
        cs.transfer(one, model)
        support.same(resolved(model.state_dict()), source)


def test_what_the_model_keeps_is_written_by_its_values(tmp_path: Path) -> None:
    (tmp_path / "lazy_net.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a = nn.Parameter(torch.zeros(2))\n"
        "        self.register_buffer('b', torch.tensor([1 + 2j, 3 - 4j]).conj())\n"
        "        self.register_buffer('c', torch.tensor([1 + 2j, 3 - 4j]).conj().imag)\n"
    )
    torch.save({"a": torch.ones(2)}, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", f"{tmp_path}/lazy_net.py:Net", tmp_path / "out.pt")
    wanted = {"a": torch.ones(2), "b": torch.tensor([1 - 2j, 3 + 4j]), "c": torch.tensor([-2.0, 4.0])}
    support.same(torch.load(tmp_path / "out.pt", weights_only=True), wanted)


@formats
def test_check_counts_what_is_not_finite(legacy: bool, tmp_path: Path) -> None:
    truth = expected(tmp_path / "in.pt", torch.complex64, legacy)
    (row,) = cs.check(tmp_path / "in.pt", finite=True).files
    counts = {finding.key: int(finding.message.split()[1]) for finding in row.findings if finding.code == "CK401"}
    # A complex number has two parts, each of which can be no number.
    parts = {key: torch.view_as_real(value) if value.is_complex() else value for key, value in truth.items()}
    assert counts == {key: count for key, value in parts.items() if (count := int(torch.isnan(value).sum()))}


def test_moments_of_an_optimizer(tmp_path: Path) -> None:
    moment = torch.tensor([1 + 2j, 3 - 4j]).conj()
    model = Complex({})
    model.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    groups = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()["param_groups"]
    state = {0: {"momentum_buffer": moment}}
    saved = {"model": {"w": torch.ones(2, dtype=torch.complex64)}, "optimizer": {"state": state, "param_groups": groups}}
    torch.save(saved, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", model, tmp_path / "out.pt", with_optimizer=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cs.transfer(tmp_path / "in.pt", model, optimizer=optimizer)
    written = torch.load(tmp_path / "out.pt", weights_only=True)["optimizer"]["state"][0]
    for found in (written["momentum_buffer"], optimizer.state[model.w]["momentum_buffer"]):
        assert support.bits(found) == support.bits(moment)


def rebuilt(tensor: Tensor, metadata: object) -> object:
    """What torch.save writes by its own rebuild function, with a metadata of our choice."""

    class Rebuilt:
        def __reduce__(self) -> object:
            args = (tensor.storage(), 0, tuple(tensor.shape), tensor.stride(), False, None)
            return torch._utils._rebuild_tensor_v2, (*args, metadata)

    return Rebuilt()


@formats
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool], ids=str
)
@pytest.mark.parametrize("bits", [("neg",), ("conj",), ("conj", "neg")], ids=" ".join)
def test_bits_that_torch_can_not_carry_out_are_refused_by_key(
    bits: tuple[str, ...], dtype: torch.dtype, legacy: bool, tmp_path: Path
) -> None:
    saved({"fine": torch.ones(3), "w": rebuilt(torch.ones(2, dtype=dtype), dict.fromkeys(bits, True))}, tmp_path / "in.pt", legacy)
    if dtype.is_floating_point and bits == ("neg",):
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt")
        support.same(torch.load(tmp_path / "out.pt", weights_only=True), loaded(tmp_path / "in.pt"))
        return
    with pytest.raises(FormatError) as caught:
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt")
    assert caught.value.key == "w" and caught.value.path


@pytest.mark.parametrize(
    "metadata", [{}, None, {"ND": True}, {"neg": True, "ND": True}, {"neg": False}, {"conj": False}, {"neg": 1}, [("neg", True)], 7]
)
def test_a_metadata_is_read_as_torch_reads_it_or_refused(metadata: object, tmp_path: Path) -> None:
    saved({"w": rebuilt(torch.tensor([1.0, 2.0]), metadata)}, tmp_path / "in.pt", False)
    try:
        truth = loaded(tmp_path / "in.pt")
    except (RuntimeError, AssertionError):  # torch's own words
        truth = None
    try:
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt")
    except FormatError:
        assert truth is None or metadata in ({"neg": False}, {"neg": 1})  # torch never writes them, and takes False for True
        return
    assert truth is not None
    support.same(torch.load(tmp_path / "out.pt", weights_only=True), truth)


def test_a_sharded_folder_and_a_nested_root(tmp_path: Path) -> None:
    c = numbers(torch.complex64)
    torch.save({"epoch": 3, "ema": {"net": {"w": c.mH}}}, tmp_path / "nested.pt")
    cs.merge(tmp_path / "nested.pt", None, tmp_path / "out.pt")
    support.same(torch.load(tmp_path / "out.pt", weights_only=True), resolved({"w": c.mH}))


@pytest.mark.parametrize("lazy", [False, True])
def test_one_part_of_one_complex_number(lazy: bool, tmp_path: Path) -> None:
    """A tensor of one element may have any stride, and torch calls it dense."""
    number = torch.tensor([5 + 6j])
    part = number.conj().imag if lazy else number.imag
    assert part.stride() == (2,) and part.is_contiguous()
    torch.save({"w": part}, tmp_path / "in.pt")
    model = Complex({})
    model.register_buffer("w", torch.tensor([7 + 8j]).conj().imag if lazy else torch.tensor([7 + 8j]).imag)
    cs.transfer(tmp_path / "in.pt", model)
    assert model.w.tolist() == part.tolist() and cs.verify(tmp_path / "in.pt", model).ok
    cs.merge(tmp_path / "in.pt", model, tmp_path / "out.pt")
    support.same(torch.load(tmp_path / "out.pt", weights_only=True), {"w": part})
