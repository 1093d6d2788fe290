"""A live model as a Checkpoint: every name, dtype, shape, stride and tie, and nothing that can't be held."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckptsurgeon.dtypes import TABLE
from ckptsurgeon.errors import FormatError, TargetError
from ckptsurgeon.models.target.skeleton import checkpoint_of, checkpoint_of_state_dict


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.same = self.head
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


class WithExtra(nn.Linear):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        self.state = state


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_is_the_models_state_dict(device):
    with torch.device(device):
        model = Tied()
    model.head.weight = model.embed.weight
    checkpoint = checkpoint_of(model, "model:Tied")
    state = model.state_dict()
    assert list(checkpoint) == list(state) and checkpoint.path == "model:Tied" and checkpoint.format == checkpoint.kind == "model"
    for key, tensor in state.items():
        meta = checkpoint[key]
        assert (meta.name, meta.shape, meta.stride, meta.span) == (key, tuple(tensor.shape), tensor.stride(), None)
    assert checkpoint["count"].dtype == checkpoint["norm.num_batches_tracked"].dtype == "I64"
    assert checkpoint.ties == (("embed.weight", "head.weight", "same.weight"),)
    assert checkpoint.module_metadata == {name: dict(value) for name, value in state._metadata.items()}
    assert checkpoint.module_metadata["norm"] == {"version": 2}


def test_meta_and_cpu_have_one_fingerprint_and_other_shapes_or_ties_another():
    with torch.device("meta"):
        on_meta = checkpoint_of(nn.Linear(2, 3), "a")
    assert on_meta.fingerprint == checkpoint_of(nn.Linear(2, 3), "b").fingerprint
    others = [nn.Linear(3, 2), nn.Linear(2, 3, bias=False), nn.Linear(2, 3).half()]
    prints = {checkpoint_of(model, "a").fingerprint for model in others} | {on_meta.fingerprint}
    loose = {key: value.clone() for key, value in Tied().state_dict().items()}
    assert checkpoint_of_state_dict(loose).fingerprint != checkpoint_of(Tied(), "a").fingerprint
    assert len(prints) == 4


def test_views_are_tied_only_when_they_are_the_same_view():
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "b": base[:], "c": base.t(), "d": base[:2], "e": base[1:], "f": base.clone(), "g": base.view(torch.int32)}
    assert checkpoint_of_state_dict(state).ties == (("a", "b"),)
    assert checkpoint_of_state_dict(state)["c"].stride == (1, 4)
    assert checkpoint_of_state_dict({"x": base[:0], "y": base[:0]}).ties == ()


def test_a_conjugate_view_is_not_tied_to_its_base():
    base = torch.zeros(2, dtype=torch.complex64)
    assert checkpoint_of_state_dict({"a": base, "b": base.conj()}).ties == ()


def test_other_values_become_entries():
    notes = []
    checkpoint = checkpoint_of(nn.Sequential(WithExtra(1, 1)), "m", note=notes.append)
    assert dict(checkpoint.entries) == {"0._extra_state": {"version": 3}} and list(checkpoint) == ["0.weight", "0.bias"]
    assert "0._extra_state" in notes[0]
    assert checkpoint_of_state_dict({"epoch": 3, "w": nn.Parameter(torch.zeros(1))}).entries == {"epoch": 3}


@given(st.sampled_from(TABLE), st.lists(st.integers(0, 3), max_size=3))
def test_every_dtype_of_the_table_is_held(row, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.empty(shape, dtype=getattr(torch, row.torch))
    meta = checkpoint_of_state_dict({"w": tensor})["w"]
    assert (meta.dtype, meta.shape, meta.nbytes) == (row.code, tuple(shape), tensor.numel() * tensor.element_size())


def unsupported():
    dense = torch.eye(3)
    yield "sparse", dense.to_sparse()
    yield "nested", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    yield "quantized", torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)
    yield "lazy", nn.LazyLinear(2).weight
    yield "dtype", torch.empty(2, dtype=torch.bits8)


@pytest.mark.parametrize("kind", ["sparse", "nested", "quantized", "lazy", "dtype"])
@pytest.mark.filterwarnings("ignore")
def test_what_can_not_be_held_is_refused_by_its_key(kind):
    with pytest.raises(FormatError) as caught:
        checkpoint_of_state_dict({"fine": torch.zeros(1), "odd": dict(unsupported())[kind]}, "here")
    assert (caught.value.key, caught.value.path) == ("odd", "here")


def test_a_key_that_is_no_string_and_a_hook_that_fails_are_refused():
    with pytest.raises(FormatError, match="not a string"):
        checkpoint_of_state_dict({3: torch.zeros(1)})
    model = nn.Linear(1, 1)
    model.register_state_dict_post_hook(lambda *args: 1 / 0)
    with pytest.raises(TargetError, match="ZeroDivisionError"):
        checkpoint_of(model, "m:Net")
