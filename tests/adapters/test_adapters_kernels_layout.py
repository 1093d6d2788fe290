"""Layout kernels on tensors, against torch, NumPy, transformers' conversion and attention itself; shapes against inference."""

import numpy as np
import pytest
import torch
from ckptsurgeon.adapters.kernels import combining, layout
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers.core_model_loading import PermuteForRope
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ckptsurgeon.adapters.combining import COMBINING
from ckptsurgeon.adapters.layout import LAYOUT
from ckptsurgeon.adapters.op import Place
from ckptsurgeon.adapters.table import parse_ops
from ckptsurgeon.errors import RuleError

ADAPTERS = {**LAYOUT, **COMBINING}
KERNELS = {**layout.KERNELS, **combining.KERNELS}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex64"),
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "uint64"),
]


def no_initial():
    raise AssertionError("only a fill by initial values asks for them")


def run(op, *tensors, initial=no_initial):
    """What the kernel gives, held against what inference said, and against writes into the inputs."""
    before = [tensor.clone() for tensor in tensors]
    shapes = ADAPTERS[op["op"]].infer(op, tuple(tuple(tensor.shape) for tensor in tensors))
    found = KERNELS[op["op"]](list(tensors), op, initial)
    assert tuple(tuple(tensor.shape) for tensor in found) == shapes
    assert all(tensor.dtype == tensors[0].dtype for tensor in found)
    assert all(same(one, other) for one, other in zip(tensors, before, strict=True))
    return found


def apply(text, *tensors, initial=no_initial, **place):
    (op,) = parse_ops(text)
    return run(ADAPTERS[op["op"]].fill(op, Place(tuple(tuple(tensor.shape) for tensor in tensors), **place)), *tensors, initial=initial)


def same(one, other):
    """Bitwise, NaN and sign of zero included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.is_complex:
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    bits = BITS[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def filled(shape, dtype=torch.float32, start=0):
    """Values that all differ, as far as the dtype goes."""
    total = int(np.prod(shape, dtype=int))
    return (torch.arange(total) + start).reshape(shape).to(dtype)


def test_every_adapter_has_a_kernel():
    assert set(layout.KERNELS) == set(LAYOUT)
    assert set(combining.KERNELS) == set(COMBINING)


sizes = st.integers(0, 6)
shapes_of = st.lists(sizes, max_size=4).map(tuple)
small = st.integers(0, 6)
FIELDS = {
    "dim": st.integers(0, 4),
    "dims": st.permutations(range(4)).map(list) | st.lists(st.integers(0, 3), max_size=4),
    "shape": st.lists(sizes, max_size=4),
    "parts": small,
    "heads": small,
    "to": st.sampled_from(["halves", "pairs"]),
    "start": small,
    "stop": small,
    "size": st.integers(0, 9),
    "given": small,
    "fill": st.sampled_from(["zeros", "mean", "init", "constant"]),
    "at": st.sampled_from(["start", "end"]),
    "value": st.integers(-3, 3) | st.floats(-9, 9),
    "scheme": st.just("model"),
    "of": small,
    "index": small,
    "sizes": st.lists(sizes, max_size=4),
    "weights": st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=4),
}


@st.composite
def ops_that_fit(draw, name):
    """A plan's op of the adapter `name` and tensors that go with it, found by trying."""
    first = draw(shapes_of)
    count = draw(st.integers(1, 4))
    shapes = [first] * count if draw(st.booleans()) else draw(st.lists(shapes_of, min_size=1, max_size=3))
    op = {"op": name} | {field: draw(FIELDS[field]) for field in ADAPTERS[name].fields}
    if name == "reshape":
        op["shape"] = draw(st.permutations(first)) if draw(st.booleans()) else [int(np.prod(first, dtype=int))]
    if name in ("transpose", "permute"):
        op["dims"] = draw(st.permutations(range(len(first))))[: 2 if name == "transpose" else None]
    if name == "squeeze" and draw(st.booleans()):
        del op["dim"]
    if name == "pad":
        op["given"] = [shape[op["dim"]] for shape in shapes if op["dim"] < len(shape)]
    if name == "average":
        op["weights"] = [1 / len(shapes)] * len(shapes)
    if name == "unsqueeze":
        shapes = [first] * count
    try:
        out = ADAPTERS[name].infer(op, tuple(shapes))
    except RuleError:
        assume(False)
    return op, shapes, out


@pytest.mark.parametrize("name", sorted(ADAPTERS))
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_kernel_gives_the_shapes_that_were_inferred(name, data):
    op, shapes, out = data.draw(ops_that_fit(name))
    tensors = [filled(shape, start=start) for start, shape in enumerate(shapes)]
    if data.draw(st.booleans()):  # neither does memory order matter
        tensors = [tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor for tensor in tensors]
    run(op, *tensors, initial=lambda: torch.ones(out[0]))


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
    assert same(apply("reshape", one, wanted=(24,))[0], torch.arange(24.0))


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


UNDONE = [
    "transpose",
    "permute((1, 2, 0))",
    "interleave(1, 3)",
    "deinterleave(-1)",
    "permute_rope(2, 'halves')",
    "permute_rope(1, 'pairs', 2)",
    "squeeze(1)",
    "unsqueeze(-1)",
    "unsqueeze(0)",
    "squeeze",
]


@pytest.mark.parametrize("text", UNDONE)
@given(shape=st.tuples(st.integers(1, 3).map(lambda n: 4 * n), st.sampled_from([1, 3, 6]), st.sampled_from([2, 4])))
@settings(deadline=None)
def test_what_an_inverse_undoes_is_undone(text, shape):
    assume(text != "interleave(1, 3)" or shape[1] != 1)
    assume(text != "squeeze(1)" or shape[1] == 1)
    tensor = filled(shape)
    (op,) = parse_ops(text)
    place = Place((shape,))
    (there,) = run(ADAPTERS[op["op"]].fill(op, place), tensor)
    back = ADAPTERS[op["op"]].invert(op)
    (again,) = run(ADAPTERS[back["op"]].fill(back, Place((tuple(there.shape),), shape)), there)
    assert same(again, tensor)


@given(parts=st.lists(st.integers(1, 4), min_size=2, max_size=4), dim=st.integers(-2, 1), sized=st.booleans())
@settings(deadline=None)
def test_a_join_is_undone_by_parts_and_parts_by_a_join(parts, dim, sized):
    tensors = [filled((size, 3) if dim % 2 == 0 else (3, size), start=50 * size) for size in parts]
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    (op,) = parse_ops(f"concat({dim}, {parts})" if sized else f"concat({dim})")
    (whole,) = run(ADAPTERS["concat"].fill(op, Place(shapes)), *tensors)
    back = ADAPTERS["concat"].invert(op)
    found = []
    for index, shape in enumerate(shapes):
        place = Place((tuple(whole.shape),), shape, index, len(parts), shapes)
        found += run(ADAPTERS["chunk"].fill(back, place), whole)
    assert all(map(same, found, tensors))
    (again,) = run(ADAPTERS["concat"].fill(ADAPTERS["chunk"].invert(back), Place(shapes)), *found)
    assert same(again, whole)


@given(shape=st.lists(st.integers(1, 3), max_size=3).map(tuple), count=st.integers(1, 4), dim=st.integers(-4, 3))
@settings(deadline=None)
def test_a_stack_is_undone(shape, count, dim):
    assume(-len(shape) - 1 <= dim <= len(shape))
    tensors = [filled(shape, start=50 * number) for number in range(count)]
    (op,) = parse_ops(f"stack({dim})")
    (whole,) = run(ADAPTERS["stack"].fill(op, Place((shape,) * count)), *tensors)
    back = ADAPTERS["stack"].invert(op)
    found = [run(ADAPTERS["unstack"].fill(back, Place((tuple(whole.shape),), number=number)), whole)[0] for number in range(count)]
    assert all(map(same, found, tensors))


def test_padding_adds_what_it_says_where_it_says():
    tensor = filled((2, 3))
    assert apply("pad(size=3)", tensor)[0].tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]
    assert apply("pad(1, size=5, at='start', value=-1.5)", tensor)[0].tolist() == [[-1.5, -1.5, 0, 1, 2], [-1.5, -1.5, 3, 4, 5]]
    assert apply("pad(size=4, fill='mean')", tensor)[0].tolist() == [[0, 1, 2], [3, 4, 5], [1.5, 2.5, 3.5], [1.5, 2.5, 3.5]]
    assert apply("pad(1, size=4, fill='mean')", tensor)[0].tolist() == [[0, 1, 2, 1], [3, 4, 5, 4]]
    initial = -filled((4, 3)) - 1
    end = apply("pad(fill='init')", tensor, wanted=(4, 3), initial=lambda: initial)[0]
    assert same(end, torch.cat([tensor, initial[2:]]))
    start = apply("pad(fill='init', at='start')", tensor, wanted=(4, 3), initial=lambda: initial)[0]
    assert same(start, torch.cat([initial[:2], tensor]))
    for fill in ("zeros", "mean", "init"):  # nothing to fill: nothing asked for, no mean of nothing
        assert same(apply(f"pad(size=2, fill={fill!r})", tensor, wanted=(2, 3))[0], tensor)
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
    ],
)
def test_values_that_a_dtype_has_not_are_refused(text, tensor, initial, words):
    with pytest.raises(RuleError) as error:
        apply(text, tensor, wanted=(3,), initial=lambda: initial)
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


def test_an_average_of_narrow_floats_does_not_lose_what_they_share():
    tensors = [torch.full((3,), 1.0, dtype=torch.bfloat16) for _ in range(1000)]
    assert apply("average", *tensors)[0].tolist() == [1.0] * 3  # a sum in bfloat16 stands still at 256
    assert same(apply("average", torch.tensor([-0.0, float("inf"), float("nan")]))[0][:2], torch.tensor([-0.0, float("inf")]))


def test_means_in_pieces_are_the_means(monkeypatch):
    tensors = [torch.randn(6, 50, 3), torch.randn(6, 50, 3).mT.contiguous().mT]
    whole = apply("average([1, 3])", *tensors)[0]
    means = [tensors[0].mean(dim, keepdim=True) for dim in range(3)]
    for piece in (1, 7, 40, 500):
        monkeypatch.setattr(combining, "PIECE", piece)
        assert same(apply("average([1, 3])", *tensors)[0], whole)
        for dim, mean in enumerate(means):
            size = tensors[0].shape[dim]
            padded = apply(f"pad({dim}, size={size + 2}, fill='mean')", tensors[0])[0]
            torch.testing.assert_close(padded.narrow(dim, size, 2), mean.expand_as(padded.narrow(dim, size, 2)))


def test_parts_and_relabelled_dims_are_views():
    tensor = filled((4, 6))
    for text in ("transpose", "permute((1, 0))", "reshape([24])", "chunk(index=1, of=2)", "slice(stop=2)", "unstack(index=1)"):
        assert apply(text, tensor)[0].untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
