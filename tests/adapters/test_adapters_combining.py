"""Adapters between parts and wholes on tensors, against torch and NumPy: joins, parts, margins and means."""

import numpy as np
import pytest
import torch
from adapters_support import apply, filled, same

from ckptsurgeon.adapters import widening
from ckptsurgeon.errors import RuleError


def test_parts_and_wholes_against_torch():
    whole = filled((6, 4, 2))
    for dim in (0, 1, -1):
        for of, parts in ((2, whole.chunk(2, dim)), (1, (whole,))):
            found = [apply(f"chunk({dim}, index={index}, of={of})", whole)[0] for index in range(of)]
            assert all(map(same, found, parts))
        cut = whole.split([1, whole.shape[dim] - 1], dim)
        found = [apply(f"chunk({dim}, sizes=[1, {whole.shape[dim] - 1}])", whole, index=index, of=2)[0] for index in range(2)]
        assert all(map(same, found, cut))
        assert same(apply(f"concat({dim})", *cut)[0], whole)
        assert same(apply(f"slice({dim}, 1, 2)", whole)[0], whole.narrow(dim, 1, 1))
        rows = whole.unbind(dim)
        assert all(same(apply(f"unstack({dim})", whole, number=number)[0], row) for number, row in enumerate(rows))
        assert same(apply(f"stack({dim})", *rows)[0], whole)


def test_joins_go_over_as_many_as_they_are_told():
    tensors = [filled((2, 3), start=10 * number) for number in range(6)]
    for of in (1, 2, 3, 6):
        groups = [tensors[start : start + of] for start in range(0, 6, of)]
        assert all(map(same, apply(f"concat(1, of={of})", *tensors), [torch.cat(group, 1) for group in groups]))
        assert all(map(same, apply(f"stack(-1, of={of})", *tensors), [torch.stack(group, -1) for group in groups]))


def test_experts_are_joined_and_taken_apart():
    """Gate and up of each expert in a row, then all experts, as fused mixture-of-experts weights are laid out; and back."""
    parts = [filled((4, 3), start=100 * number) for number in range(6)]  # w1, w3 of experts 0, 1, 2
    fused = apply("stack", *apply("concat(of=2)", *parts))[0]
    assert same(fused, torch.stack([torch.cat(parts[2 * e : 2 * e + 2]) for e in range(3)]))
    for number, part in enumerate(parts):
        expert = apply("unstack", fused, number=number // 2)[0]
        assert same(apply("chunk(0)", expert, index=number % 2, of=2)[0], part)


def test_padding_adds_what_it_says_where_it_says():
    tensor = filled((2, 3))
    assert apply("pad(size=3)", tensor)[0].tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]
    assert apply("pad(1, size=5, at='start', value=-1.5)", tensor)[0].tolist() == [[-1.5, -1.5, 0, 1, 2], [-1.5, -1.5, 3, 4, 5]]
    assert apply("pad(size=4, fill='mean')", tensor)[0].tolist() == [[0, 1, 2], [3, 4, 5], [1.5, 2.5, 3.5], [1.5, 2.5, 3.5]]
    assert apply("pad(1, size=4, fill='mean')", tensor)[0].tolist() == [[0, 1, 2, 1], [3, 4, 5, 4]]
    initial = -filled((4, 3)) - 1
    end = apply("pad(fill='init')", tensor, target=(4, 3), initial=lambda: initial)[0]
    assert same(end, torch.cat([tensor, initial[2:]]))
    start = apply("pad(fill='init', at='start')", tensor, target=(4, 3), initial=lambda: initial)[0]
    assert same(start, torch.cat([initial[:2], tensor]))
    for fill in ("zeros", "mean", "init"):  # nothing to fill: nothing asked for, no mean of nothing
        assert same(apply(f"pad(size=2, fill={fill!r})", tensor, target=(2, 3))[0], tensor)
    assert apply("pad(size=0, fill='mean')", filled((0, 3)))[0].shape == (0, 3)
    assert apply("pad(size=3)", torch.ones(2, dtype=torch.bool))[0].tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_means_of_narrow_floats_are_taken_in_wide_ones(dtype):
    tensor = torch.full((4096, 1), 1.0).to(dtype)
    tensor[0] = 2
    found = apply("pad(size=4097, fill='mean')", tensor)[0]
    assert same(found[-1:], tensor.double().mean(0, keepdim=True).to(dtype))


@pytest.mark.parametrize(
    ("text", "tensor", "initial", "words"),
    [
        ("pad(size=3, fill='mean')", torch.ones(2, dtype=torch.int64), None, "fills up with a mean, and the tensor is int64"),
        ("pad(size=3, fill='mean')", torch.ones(2, dtype=torch.bool), None, "the tensor is bool"),
        ("pad(size=3, value=0.5)", torch.ones(2, dtype=torch.int64), None, "0.5, which int64 can't hold"),
        ("pad(size=3, value=256)", torch.ones(2, dtype=torch.uint8), None, "256, which uint8 can't hold"),
        ("pad(size=3, value=-1)", torch.ones(2, dtype=torch.uint8), None, "can't hold"),
        ("pad(size=3, value=2)", torch.ones(2, dtype=torch.bool), None, "which bool can't hold"),
        ("pad(size=3, value=1e6)", torch.ones(2, dtype=torch.float16), None, "1000000.0, which float16 can't hold"),
        ("pad(size=3, value=1e6)", torch.ones(2).to(torch.float8_e5m2), None, "which float8_e5m2 can't hold"),
        ("pad(size=3)", torch.ones(2).to(torch.float8_e8m0fnu), None, "which float8_e8m0fnu can't hold"),
        ("pad(size=3, fill='init')", torch.ones(2), torch.ones(4), "makes (3,) and fills up with an initial value of (4,)"),
        ("pad(size=3, fill='init')", torch.ones(2, dtype=torch.int64), torch.ones(3), "fills int64 up with an initial float32"),
        ("average", torch.ones(2, dtype=torch.int64), None, "goes over floats, and a tensor is int64"),
        ("group_mean(heads=2, to=1)", torch.ones(2, dtype=torch.int64), None, "goes over floats, and the tensor is int64"),
    ],
)
def test_values_that_a_dtype_has_not_are_refused(text, tensor, initial, words):
    with pytest.raises(RuleError) as error:
        apply(text, tensor, target=(3,), initial=lambda: initial)
    assert words in error.value.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (0, 4), (1, 9, 2)])
def test_averages_against_numpy(shape, dtype):
    torch.manual_seed(1)
    tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
    wide = np.float64 if dtype == torch.float64 else np.float32
    arrays = [tensor.double().numpy().astype(wide) for tensor in tensors]
    for text, weights in (("average", [1, 1, 1]), ("average([1, 2, 5])", [1, 2, 5]), ("average([0, 1, 0])", [0, 1, 0])):
        wanted = torch.from_numpy(np.asarray(np.average(np.stack(arrays).astype(np.float64), 0, weights))).to(dtype)
        found = apply(text, *tensors)[0]
        torch.testing.assert_close(
            found.double(), wanted.double(), rtol=torch.finfo(dtype).eps, atol=1e-7 if dtype != torch.float64 else 1e-15
        )
    assert same(apply("average([0, 1, 0])", *tensors)[0] + 0, tensors[1] + 0) if dtype.itemsize > 1 else True


@pytest.mark.parametrize("count", [3, 5, 7])
def test_the_mean_of_equal_tensors_is_the_tensor_and_ties_are_rounded_as_the_exact_mean_is(count):
    value = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply("average", *[value] * count)[0], value)
    narrow = [torch.randn(5000, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(count)]
    exact = (torch.stack(narrow).double().sum(0) / count).bfloat16()
    assert torch.equal(apply("average", *narrow)[0], exact)


def test_an_average_of_narrow_floats_does_not_lose_what_they_share():
    tensors = [torch.full((3,), 1.0, dtype=torch.bfloat16) for _ in range(1000)]
    assert apply("average", *tensors)[0].tolist() == [1.0] * 3  # a sum in bfloat16 stands still at 256
    assert same(apply("average", torch.tensor([-0.0, float("inf"), float("nan")]))[0][:2], torch.tensor([-0.0, float("inf")]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 2, 4), (6, 6, 3), (4, 1, 2)])
def test_heads_of_a_group_are_averaged_as_the_paper_converts_them(dtype, heads, groups, size):
    """Ainslie et al. 2023, section 2.1: each group's key and value heads are mean-pooled into one; by hand in torch."""
    torch.manual_seed(2)
    weight, bias = torch.randn(heads * size, 5).to(dtype), torch.randn(heads * size).to(dtype)
    pooled = [weight.double().view(groups, heads // groups, size, 5)[group].sum(0) * groups / heads for group in range(groups)]
    found = apply(f"group_mean(heads={heads})", weight, target=(groups * size, 5))[0]
    torch.testing.assert_close(found.double(), torch.cat(pooled), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert same(apply(f"group_mean({heads}, {groups}, 1)", weight.mT.contiguous())[0], found.mT)
    assert same(apply(f"group_mean({heads}, {groups})", bias)[0], apply(f"group_mean({heads}, {groups})", bias.unsqueeze(1))[0].squeeze(1))


def test_grouped_attention_with_averaged_heads_is_the_attention_of_heads_that_were_equal():
    """Where the heads of a group are equal already, nothing changes: torch's attention with `enable_gqa` against that with all heads."""
    torch.manual_seed(3)
    heads, groups, size, width = 6, 2, 4, 10
    x, q = torch.randn(1, 7, width), torch.randn(heads * size, width)
    few = [torch.randn(groups * size, width) for _ in range(2)]
    many = [one.view(groups, 1, size, width).expand(-1, heads // groups, -1, -1).reshape(heads * size, width) for one in few]
    k, v = (apply(f"group_mean(heads={heads})", one, target=(groups * size, width))[0] for one in many)

    def by_head(weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).unflatten(-1, (-1, size)).transpose(1, 2)

    whole = torch.nn.functional.scaled_dot_product_attention(by_head(q), *map(by_head, many))
    found = torch.nn.functional.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v), enable_gqa=True)
    torch.testing.assert_close(found, whole)


def test_means_in_pieces_are_the_means(monkeypatch):
    tensors = [torch.randn(6, 50, 3), torch.randn(6, 50, 3).mT.contiguous().mT]
    whole = apply("average([1, 3])", *tensors)[0]
    means = [tensors[0].mean(dim, keepdim=True) for dim in range(3)]
    for piece in (1, 7, 40, 500):
        monkeypatch.setattr(widening, "BLOCK_ELEMENTS", piece)
        assert same(apply("average([1, 3])", *tensors)[0], whole)
        for dim, mean in enumerate(means):
            size = tensors[0].shape[dim]
            padded = apply(f"pad({dim}, size={size + 2}, fill='mean')", tensors[0])[0]
            torch.testing.assert_close(padded.narrow(dim, size, 2), mean.expand_as(padded.narrow(dim, size, 2)))
