"""Layout adapters on tensors, against torch, NumPy, transformers' conversion and attention itself."""

import numpy as np
import pytest
import torch
from adapters_support import apply, filled, run, same
from transformers.core_model_loading import PermuteForRope
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex64"),
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "uint64"),
]


def test_one_tensor_laid_out_anew_against_numpy():
    tensor = filled((2, 3, 4))
    array = tensor.numpy()
    expected = {
        "transpose": np.swapaxes(array, 1, 2),
        "transpose((0, 2))": np.swapaxes(array, 0, 2),
        "permute((2, 0, 1))": np.transpose(array, (2, 0, 1)),
        "reshape([6, -1])": array.reshape(6, 4),
        "unsqueeze(-1)": array[..., None],
        "unsqueeze(1)": array[:, None],
    }
    for text, wanted in expected.items():
        assert same(apply(text, tensor)[0], torch.from_numpy(np.ascontiguousarray(wanted)))
    one = tensor[:, None, :, None]
    assert same(apply("squeeze", one)[0], tensor)
    assert same(apply("squeeze(1)", one)[0], tensor[:, :, None])
    assert same(run({"op": "squeeze"}, one)[0], tensor)
    assert same(run({"op": "squeeze", "dim": 3}, one)[0], tensor[:, None])
    assert same(run({"op": "unsqueeze", "dim": 3}, tensor)[0], tensor[..., None])
    assert same(apply("reshape", one, target=(24,))[0], torch.arange(24.0))


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_interleaving_takes_turns(parts):
    assert apply("interleave", torch.tensor([10, 11, 12, 20, 21, 22]))[0].tolist() == [10, 20, 11, 21, 12, 22]
    tensor = filled((4, 6, 5))
    turns = np.stack(np.split(tensor.numpy(), parts, 1), 2).reshape(4, 6, 5)
    found = apply(f"interleave(1, {parts})", tensor)[0]
    assert same(found, torch.from_numpy(turns))
    assert same(apply(f"deinterleave(1, {parts})", found)[0], tensor)
    assert same(apply(f"deinterleave(1, {parts})", tensor)[0], torch.cat([tensor[:, start::parts] for start in range(parts)], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (1, 8), (4, 6), (3, 4)])
def test_rotary_layouts_against_transformers(heads, size, dtype):
    config = LlamaConfig(num_attention_heads=heads, hidden_size=heads * size)
    for shape in ((heads * size, 5), (heads * size,)):
        tensor = filled(shape, dtype)
        for to, inverse in (("halves", False), ("pairs", True)):
            wanted = PermuteForRope(inverse=inverse)._permute_for_rope(tensor, config)
            assert same(apply(f"permute_rope({heads}, {to!r})", tensor)[0], wanted)
            if tensor.dim() == 2:
                assert same(apply(f"permute_rope({heads}, {to!r}, -1)", tensor.T)[0].T, wanted)


def test_rotary_layouts_keep_what_attention_computes():
    """Meta's rotation of complex pairs on the one layout, Hugging Face's of halves on the other: the same scores."""
    torch.manual_seed(0)
    heads, kv_heads, size, width, length = 4, 2, 6, 10, 5
    q, k = torch.randn(heads * size, width, dtype=torch.float64), torch.randn(kv_heads * size, width, dtype=torch.float64)
    x = torch.randn(length, width, dtype=torch.float64)
    angles = torch.outer(torch.arange(length).double(), 10000.0 ** (-torch.arange(0, size, 2).double() / size))

    def meta(weight, count):
        pairs = torch.view_as_complex((x @ weight.T).view(length, count, size // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2).transpose(0, 1)

    def scores(queries, keys):
        return queries @ keys.repeat_interleave(heads // kv_heads, 0).mT

    both = torch.cat([angles, angles], -1)[None]
    hf_q, hf_k = (
        (x @ apply(f"permute_rope({count}, to='halves')", weight)[0].T).view(1, length, count, size).transpose(1, 2)
        for weight, count in ((q, heads), (k, kv_heads))
    )
    rotated_q, rotated_k = apply_rotary_pos_emb(hf_q, hf_k, both.cos(), both.sin())
    torch.testing.assert_close(scores(rotated_q[0], rotated_k[0]), scores(meta(q, heads), meta(k, kv_heads)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", DTYPES)
def test_layouts_move_elements_of_every_dtype_as_they_are(name):
    dtype = getattr(torch, name)
    raw = torch.arange(24 * dtype.itemsize, dtype=torch.uint8)
    tensor = ((raw % 2).bool() if dtype == torch.bool else raw.view(dtype)).reshape(4, 6)  # whatever bits, NaN too
    assert same(apply("transpose", tensor)[0], tensor.T)
    assert same(apply("permute((1, 0))", tensor)[0], tensor.T)
    assert same(apply("reshape([2, -1])", tensor)[0], tensor.reshape(2, 12))
    assert same(apply("concat", *tensor.split(1))[0], tensor)
    assert same(apply("stack", *tensor.unbind())[0], tensor)
    assert same(apply("chunk", tensor, index=1, of=2)[0], tensor[2:])
    assert same(apply("slice(1, 2, 5)", tensor)[0], tensor[:, 2:5])
    order = [0, 2, 1, 3]
    assert same(apply("interleave", tensor)[0], torch.stack([tensor[row] for row in order]))
    assert same(apply("permute_rope(1, 'halves')", tensor)[0], torch.stack([tensor[row] for row in order]))
    if dtype != torch.float8_e8m0fnu:  # it has no zero
        padded = apply("pad(size=5)", tensor)[0]
        assert same(padded[:4], tensor)
        assert not padded[4:].contiguous().view(torch.uint8).any()


def test_parts_and_relabelled_dims_are_views():
    tensor = filled((4, 6))
    for text in ("transpose", "permute((1, 0))", "reshape([24])", "chunk(index=1, of=2)", "slice(stop=2)", "unstack(index=1)"):
        assert apply(text, tensor)[0].untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
