"""Values as bytes, for every dtype, and the provider of initial values."""

import gc
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckptsurgeon.dtypes import BY_CODE, TABLE
from ckptsurgeon.errors import CastError, ModelError, RuleError
from ckptsurgeon.models.init.initialize import value
from ckptsurgeon.models.init.values import extra_state, make_provider, tensor_bytes
from ckptsurgeon.models.target.skeleton import checkpoint_of
from ckptsurgeon.tensors import TensorMeta


@given(st.sampled_from(TABLE), st.binary(min_size=16 * 6, max_size=16 * 6), st.booleans())
def test_bytes_come_back_as_they_are(row, data, transposed):
    raw = bytearray(data[: row.size * 6]) if row.code != "BOOL" else bytearray(byte % 2 for byte in data[:6])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, row.torch)).reshape(2, 3)
        if transposed:
            pieces = [raw[(i * 3 + j) * row.size :][: row.size] for j in range(3) for i in range(2)]
            assert tensor_bytes(tensor.t()) == b"".join(pieces)
        assert tensor_bytes(tensor) == raw


def test_a_view_is_not_a_copy_keeps_its_tensor_and_can_not_be_written():
    tensor = torch.arange(3.0)
    view = tensor_bytes(tensor)
    tensor[0] = 7
    assert torch.frombuffer(bytearray(view), dtype=torch.float32)[0] == 7 and view.readonly
    del tensor
    gc.collect()
    part = view[4:8]
    del view
    gc.collect()
    torch.full((3,), 9.0)
    assert bytes(part) == b"\x00\x00\x80?"


def test_special_views_give_their_values():
    base = torch.tensor([1 + 2j, 3 - 4j])
    assert tensor_bytes(base.conj()) == tensor_bytes(torch.tensor([1 - 2j, 3 + 4j]))
    assert tensor_bytes(base.conj().imag) == tensor_bytes(torch.tensor([-2.0, 4.0]))
    assert tensor_bytes(torch.tensor(3, dtype=torch.int16).expand(2)) == b"\x03\x00\x03\x00"
    assert tensor_bytes(nn.Parameter(torch.zeros(0, 3))) == b""
    with pytest.raises(ModelError):
        tensor_bytes(torch.empty(1, device="meta"))


def test_the_provider_gives_the_models_value_or_the_schemes():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    shapes = checkpoint_of(model, "m")
    provide = make_provider(model, {"0.weight": "xavier_normal", "1.weight": "per_layer_type"}, shapes, 5)
    assert provide("0.weight") == tensor_bytes(value("xavier_normal", "0.weight", (2, 3), "F32", 5, None))
    assert provide("0.bias") == tensor_bytes(model[0].bias)
    assert provide("1.weight") == tensor_bytes(torch.ones(2))
    assert provide("1.num_batches_tracked") == bytes(8)


def test_the_provider_casts_to_the_dtype_that_is_wanted_and_never_overflows():
    model = nn.Linear(2, 1)
    half = {"weight": TensorMeta("weight", "F16", (1, 2), (2, 1)), "bias": TensorMeta("bias", "I8", (1,), (1,))}
    provide = make_provider(model, {}, half, 0)
    assert provide("weight") == tensor_bytes(model.weight.half())
    with torch.no_grad():
        model.weight.fill_(1e6)
        model.bias.fill_(0.5)
    for key in half:
        with pytest.raises(CastError) as caught:
            provide(key)
        assert caught.value.key == key


def test_without_a_model_only_schemes_have_values():
    shapes = {"w": TensorMeta("w", "BF16", (2, 2), (2, 1))}
    assert make_provider(None, {"w": "ones"}, shapes, 0)("w") == tensor_bytes(torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ModelError, match="no model is known"):
        make_provider(None, {}, shapes, 0)("w")
    with pytest.raises(RuleError, match="no model is known"):
        make_provider(None, {"w": "per_layer_type"}, shapes, 0)("w")


def test_a_shape_or_key_that_the_model_has_not_is_an_error():
    shapes = {"weight": TensorMeta("weight", "F32", (9, 9), (9, 1)), "nope": TensorMeta("nope", "F32", (1,), (1,))}
    provide = make_provider(nn.Linear(2, 1), {}, shapes, 0)
    for key in shapes:
        with pytest.raises(ModelError) as caught:
            provide(key)
        assert caught.value.key == key


def test_extra_state_is_the_models_own():
    class WithExtra(nn.Linear):
        def get_extra_state(self):
            return 7

    assert extra_state(nn.Sequential(WithExtra(1, 1))) == {"0._extra_state": 7}
    assert extra_state(nn.Linear(1, 1)) == {}


@given(st.sampled_from([row for row in TABLE if row.code != "F8_E8M0"]), st.lists(st.integers(0, 3), max_size=3))
def test_a_provided_value_has_the_bytes_that_its_meta_says(row, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meta = TensorMeta("k", row.code, tuple(shape), (0,) * len(shape))
        given_bytes = make_provider(None, {"k": "zeros"}, {"k": meta}, 0)("k")
    assert given_bytes == bytes(meta.nbytes) and BY_CODE[row.code] is row
