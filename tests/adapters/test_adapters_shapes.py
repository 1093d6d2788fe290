"""Layout and combining adapters over shapes: what is left out is filled in, what can't be told is refused, no plan's op crashes."""

import json
import math

import pytest
from adapters_support import OF_FAMILY
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.adapters.chain import check_fields
from ckptsurgeon.adapters.op import FillContext
from ckptsurgeon.adapters.table import offers, op_text, parse_ops
from ckptsurgeon.errors import RuleError

ALL = {**OF_FAMILY["layout"], **OF_FAMILY["combining"]}


def rule(text):
    (op,) = parse_ops(text)
    return op


def fill(text, *shapes, **place):
    op = rule(text)
    return ALL[op["op"]].fill(op, FillContext(shapes, **place))


def infer(op, *shapes):
    return ALL[op["op"]].infer(op, shapes)


def invert(text):
    op = rule(text)
    found = ALL[op["op"]].invert(op)
    return None if found is None else op_text(found)


SPLIT = {"siblings": ((8, 3), (2, 3), (2, 3)), "of": 3}

# A rule's text, the shapes that come in, what else is known -> the op as the plan has it, without its name where it is the same.
FILLED = [
    ("slice(stop=4)", [(9, 2)], {}, {"dim": 0, "start": 0, "stop": 4}),
    ("slice(start=3)", [(9, 2)], {"target": (5, 2)}, {"dim": 0, "start": 3, "stop": 8}),
    ("slice(-1, 1, 2)", [(9, 2)], {}, {"dim": 1, "start": 1, "stop": 2}),
    ("pad", [(9, 2)], {"target": (12, 2)}, {"dim": 0, "size": 12, "given": [9], "fill": "zeros", "at": "end"}),
    ("pad(-1, at='start', fill='mean')", [(9, 2)], {"target": (9, 4)}, {"dim": 1, "size": 4, "given": [2], "fill": "mean", "at": "start"}),
    ("pad(size=10, value=0.5)", [(9, 2)], {}, {"dim": 0, "size": 10, "given": [9], "fill": "constant", "at": "end", "value": 0.5}),
    ("pad(fill='init')", [(9,)], {"target": (12,)}, {"dim": 0, "size": 12, "given": [9], "fill": "init", "at": "end", "scheme": "model"}),
    ("pad(fill='init', scheme='normal(std=0.02)')", [(9,)], {"target": (12,)},
     {"dim": 0, "size": 12, "given": [9], "fill": "init", "at": "end", "scheme": "normal(std=0.02)"}),
    ("concat", [(2, 3), (4, 3)], {}, {"dim": 0, "of": 2}),
    ("concat(-1, of=2)", [(2, 3)] * 4, {}, {"dim": 1, "of": 2}),
    ("concat(sizes=[2, 4])", [(2, 3), (4, 3)], {}, {"dim": 0, "of": 2}),
    ("concat(sizes=[2, 4])", [(2, 3), (4, 3)] * 3, {}, {"dim": 0, "of": 2}),
    ("chunk", [(12, 3)], {"of": 3, "index": 1}, {"dim": 0, "index": 1, "of": 3}),
    ("chunk(1)", [(4, 12)], {"of": 3, "index": 2, "target": (4, 4), "siblings": ((4, 4),) * 3}, {"dim": 1, "index": 2, "of": 3}),
    ("chunk", [(12, 3)], {**SPLIT, "target": (8, 3), "index": 0}, {"op": "slice", "dim": 0, "start": 0, "stop": 8}),
    ("chunk", [(12, 3)], {**SPLIT, "target": (2, 3), "index": 2}, {"op": "slice", "dim": 0, "start": 10, "stop": 12}),
    ("chunk", [(12, 3)], {**SPLIT, "index": 2}, {"dim": 0, "index": 2, "of": 3}),  # not the last op: siblings are other tensors' shapes
    ("chunk", [(24, 3)], {**SPLIT, "target": (2, 3), "index": 2}, {"dim": 0, "index": 2, "of": 3}),  # they don't add up
    ("chunk(of=3)", [(12, 3)], {**SPLIT, "target": (2, 3), "index": 1}, {"op": "slice", "dim": 0, "start": 8, "stop": 10}),
    ("chunk(sizes=[6, 3, 3])", [(12,)], {"of": 3, "index": 1}, {"op": "slice", "dim": 0, "start": 6, "stop": 9}),
    ("chunk(sizes=[4, 4, 4])", [(12,)], {"of": 3, "index": 1}, {"dim": 0, "index": 1, "of": 3}),
    ("chunk(index=1, of=4)", [(12,)], {}, {"dim": 0, "index": 1, "of": 4}),
    ("chunk(index=1, of=2)", [(12, 3)], {**SPLIT, "target": (8, 3), "index": 0}, {"dim": 0, "index": 1, "of": 2}),
    ("chunk(sizes=[5, 7], index=1)", [(12,)], {}, {"op": "slice", "dim": 0, "start": 5, "stop": 12}),
    ("chunk(of=3, parts=[0, 2])", [(12, 3)], {"of": 2, "index": 1}, {"dim": 0, "index": 2, "of": 3}),
    ("chunk(sizes=[6, 2, 4], parts=[2, 0])", [(12,)], {"of": 2, "index": 0}, {"op": "slice", "dim": 0, "start": 8, "stop": 12}),
    ("chunk(sizes=[0, 0])", [(0, 2)], {"of": 2, "index": 1}, {"op": "slice", "dim": 0, "start": 0, "stop": 0}),
    ("chunk(of=3)", [(12,)], {"of": 3, "index": 2}, {"dim": 0, "index": 2, "of": 3}),
    ("stack", [(2, 3)] * 4, {}, {"dim": 0, "of": 4}),
    ("stack(-1, of=2)", [(2, 3)] * 4, {}, {"dim": 2, "of": 2}),
    ("unstack", [(8, 2, 3)], {"number": 5}, {"dim": 0, "index": 5}),
    ("unstack(-1, 2)", [(8, 2, 3)], {"number": 5}, {"dim": 2, "index": 2}),
    ("unstack", [(3, 2)], {"of": 3, "index": 1}, {"dim": 0, "index": 1}),
    ("transpose", [(3, 4)], {}, {"dims": [0, 1]}),
    ("transpose", [(2, 3, 4)], {}, {"dims": [1, 2]}),
    ("transpose((0, -1))", [(2, 3, 4)], {}, {"dims": [0, 2]}),
    ("permute((2, 0, -2))", [(2, 3, 4)], {}, {"dims": [2, 0, 1]}),
    ("reshape", [(2, 6)], {"target": (3, 4)}, {"shape": [3, 4]}),
    ("reshape([3, -1])", [(2, 6)], {"target": (3, 4)}, {"shape": [3, 4]}),
    ("reshape([])", [(1, 1)], {}, {"shape": []}),
    ("squeeze", [(1, 3, 1)], {}, {"op": "reshape", "shape": [3]}),
    ("squeeze(-1)", [(1, 3, 1)], {}, {"op": "reshape", "shape": [1, 3]}),
    ("squeeze(0)", [(1, 3), (1, 4)], {}, {"dim": 0}),  # no one shape for both
    ("unsqueeze(-1)", [(4, 3)], {}, {"op": "reshape", "shape": [4, 3, 1]}),
    ("unsqueeze(0)", [()], {}, {"op": "reshape", "shape": [1]}),
    ("interleave", [(6,)], {}, {"dim": 0, "parts": 2}),
    ("deinterleave(-1, 3)", [(4, 6)], {}, {"dim": 1, "parts": 3}),
    ("permute_rope(4, to='halves')", [(32, 8)], {}, {"heads": 4, "to": "halves", "dim": 0}),
    ("permute_rope(4, 'pairs', -1)", [(8, 32)], {}, {"heads": 4, "to": "pairs", "dim": 1}),
    ("average", [(2,)] * 4, {}, {"weights": [0.25] * 4}),
    ("average([3, 1])", [(2,)] * 2, {}, {"weights": [0.75, 0.25]}),
    ("average([1e308, 1e308])", [(2,)] * 2, {}, {"weights": [0.5, 0.5]}),
    ("group_mean(8)", [(16, 3)], {"target": (4, 3)}, {"heads": 8, "to": 2, "dim": 0}),
    ("group_mean(8, 4, -1)", [(3, 16)], {}, {"heads": 8, "to": 4, "dim": 1}),
    ("average([0, 2])", [(2,)] * 2, {}, {"weights": [0.0, 1.0]}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shapes", "place", "filled"), FILLED)
def test_a_rules_op_is_filled_in(text, shapes, place, filled):
    found = fill(text, *shapes, **place)
    assert found == {"op": rule(text)["op"], **filled}
    assert json.loads(json.dumps(found)) == found
    check_fields(found)
    infer(found, *shapes)


# A rule's text, the shapes that come in, what else is known, words of the error.
REFUSED = [
    ("slice(stop=4)", [(3, 2)], {}, "takes 0 to 4 of dim 0, and (3, 2) has 3 there"),
    ("slice(start=2, stop=1)", [(3, 2)], {}, "takes 2 to 1"),
    ("slice(start=2)", [(3, 2)], {}, "does not know 'stop'"),
    ("slice(start=2)", [(3, 2)], {"target": ()}, "does not know 'stop'"),
    ("slice(2, stop=1)", [(3, 2)], {}, "is for dim 2, and (3, 2) has 2 dims"),
    ("slice(-3, stop=1)", [(3, 2)], {}, "is for dim -3, and (3, 2) has 2 dims"),
    ("slice(-1, stop=1)", [(3, 2), (3,)], {}, "counts dim -1 from the end of 2 tensors"),
    ("slice(-1, stop=1)", [], {}, "counts dim -1 from the end of 0 tensors"),
    ("pad", [(3, 2)], {}, "does not know 'size'"),
    ("pad(size=2)", [(3, 2)], {}, "makes dim 0 2 long, and (3, 2) has 3"),
    ("pad(size=4, fill='mean')", [(0, 2)], {}, "has no mean"),
    ("pad(size=4, fill='zeros', value=3)", [(3, 2)], {}, "has value=3 beside fill='zeros'"),
    ("pad(size=4, scheme='zeros')", [(3, 2)], {}, "has scheme='zeros' beside fill='zeros'"),
    ("pad(size=4, fill='constant')", [(3, 2)], {}, "lacks 'value'"),
    ("pad(size=4, fill='init')", [(3, 2)], {}, "a target's initial value, and here is none"),
    ("pad(fill='init')", [(3, 2), (3, 2)], {"target": (4, 2)}, "fills 2 tensors up with one"),
    ("pad(size=1000000000000000000)", [(3, 2)], {}, "too large"),
    ("concat", [], {}, "joins 0 tensors at a time, and 0 come in"),
    ("concat(of=2)", [(2,)] * 3, {}, "joins 2 tensors at a time, and 3 come in"),
    ("concat(of=0)", [(2,)] * 3, {}, "joins 0 tensors"),
    ("concat", [(2, 3), (2, 4)], {}, "joins dim 0 of (2, 3) and (2, 4), which differ in another dim too"),
    ("concat(1)", [(2, 3), (2,)], {}, "is for dim 1, and (2,) has 1 dims"),
    ("concat", [(2, 3), (2,)], {}, "differ in another dim"),
    ("concat(sizes=[3, 2])", [(2, 3), (3, 3)], {}, "is to join sizes [3, 2] of dim 0, and [2, 3] come in"),
    ("concat(sizes=[])", [(2, 3)], {}, "joins 0 tensors"),
    ("chunk", [(10,)], {"of": 3}, "needs dim 0 in 3 equal parts, and (10,) has 10 there"),
    ("chunk", [(10,)], {}, "has one result"),
    ("chunk(index=2)", [(10,)], {}, "takes part 2 of 1"),
    ("chunk(of=2)", [(10,)], {}, "has one result for 2 parts"),
    ("chunk(of=3, parts=[0, 2])", [(9,)], {}, "takes the parts [0, 2], and has one result"),
    ("chunk(of=3, parts=[0], index=1)", [(9,)], {}, "takes the parts [0], and has one result"),
    ("chunk(of=2, parts=[0, 2])", [(8,)], {"of": 2, "index": 1}, "takes part 2 of 2"),
    ("chunk(of=5)", [(10,)], {"of": 2}, "has 2 results for 5 parts"),
    ("chunk(sizes=[5, 5])", [(10,)], {"of": 3}, "has 3 results for 2 parts"),
    ("chunk(sizes=[5, 5], of=3, index=0)", [(10,)], {}, "has 2 sizes for 3 parts"),
    ("chunk(sizes=[5, 6])", [(10,)], {"of": 2}, "cuts dim 0 into [5, 6], 11 in all, and (10,) has 10"),
    ("chunk(index=3, of=3)", [(9,)], {}, "takes part 3 of 3"),
    ("chunk(index=0, of=0)", [(9,)], {}, "takes part 0 of 0"),
    ("chunk(1)", [(9,)], {"of": 3}, "is for dim 1"),
    ("stack", [(2, 3), (2, 4)], {}, "stacks (2, 3) and (2, 4), which differ"),
    ("stack(3)", [(2, 3)] * 2, {}, "adds dim 3, and (2, 3) has 2 dims"),
    ("stack(of=2)", [(2, 3)] * 3, {}, "joins 2 tensors at a time"),
    ("unstack", [(2, 3)], {}, "does not know which one"),
    ("unstack", [(2, 3)], {"number": 2}, "takes number 2 of dim 0, and (2, 3) has 2 there"),
    ("unstack", [(4, 3)], {"of": 3}, "has 3 results, and (4, 3) has 4 in dim 0"),
    ("unstack(index=0)", [()], {}, "is for dim 0, and () has 0 dims"),
    ("transpose", [(5,)], {}, "needs two dims, and (5,) has 1"),
    ("transpose((0, 1, 2))", [(5, 6, 7)], {}, "swaps two dims, not [0, 1, 2]"),
    ("transpose((1, -1))", [(5, 6)], {}, "swaps two dims, not [1, 1]"),
    ("transpose((0, 2))", [(5, 6)], {}, "is for dim 2"),
    ("permute", [(5, 6)], {}, "lacks 'dims'"),
    ("permute((0, 0))", [(5, 6)], {}, "orders dims [0, 0], and (5, 6) has 2 dims"),
    ("permute((0, 1, 2))", [(5, 6)], {}, "orders dims [0, 1, 2]"),
    ("reshape", [(5, 6)], {}, "does not know the shape"),
    ("reshape([4, 7])", [(5, 6)], {}, "makes (4, 7) of (5, 6)"),
    ("reshape([-1, -1])", [(5, 6)], {}, "more than one size open"),
    ("reshape([-1, 7])", [(5, 6)], {}, "can't tell -1"),
    ("reshape([-1, 0])", [(5, 0)], {}, "can't tell -1"),
    ("squeeze(0)", [(5, 1)], {}, "takes out dim 0, and (5, 1) has 5 there, not 1"),
    ("squeeze(2)", [(5, 1)], {}, "is for dim 2"),
    ("unsqueeze", [(5, 1)], {}, "lacks 'dim'"),
    ("unsqueeze(3)", [(5, 1)], {}, "adds dim 3, and (5, 1) has 2 dims"),
    ("unsqueeze(-4)", [(5, 1)], {}, "is for dim -4"),
    ("interleave", [(5, 2)], {}, "needs dim 0 in 2 equal parts, and (5, 2) has 5"),
    ("deinterleave(parts=0)", [(5, 2)], {}, "in 0 equal parts"),
    ("permute_rope", [(8, 2)], {}, "needs the number of heads"),
    ("permute_rope(2)", [(8, 2)], {}, "needs its direction"),
    ("permute_rope(3, 'pairs')", [(8, 2)], {}, "in 3 equal parts"),
    ("permute_rope(0, 'pairs')", [(8, 2)], {}, "in 0 equal parts"),
    ("permute_rope(2, 'pairs')", [(6, 2)], {}, "needs heads of an even size, and 2 heads of (6, 2) have 3"),
    ("group_mean", [(8, 2)], {"target": (4, 2)}, "needs the number of heads"),
    ("group_mean(heads=4)", [(8, 2)], {}, "does not know 'to'"),
    ("group_mean(heads=4)", [(8, 2)], {"target": (3, 2)}, "can't tell how many heads of 2 rows 3 rows are"),
    ("group_mean(heads=3)", [(8, 2)], {"target": (4, 2)}, "needs dim 0 in 3 equal parts"),
    ("group_mean(heads=4, to=3)", [(8, 2)], {"target": (6, 2)}, "can't take the mean of 4 heads in 3 groups"),
    ("average", [(2,), (3,)], {}, "goes over (2,) and (3,), which differ"),
    ("average([1, 2, 3])", [(2,), (2,)], {}, "has 3 weights for 2 tensors"),
    ("average([0, 0])", [(2,), (2,)], {}, "has weights [0, 0]"),
    ("average([-1, 2])", [(2,), (2,)], {}, "has weights [-1, 2]"),
    ("average", [], {}, "has weights []"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shapes", "place", "words"), REFUSED)
def test_what_does_not_go_together_is_refused_in_words(text, shapes, place, words):
    with pytest.raises(RuleError) as error:
        infer(fill(text, *shapes, **place), *shapes)
    assert words in error.value.reason
    assert error.value.reason.startswith(rule(text)["op"])


@pytest.mark.parametrize(
    "text",
    [
        "average(['a'])",
        f"average([{10**400}])",
        "average([1e999])",
        "chunk(0.5)",
        "chunk(of=-1)",
        "concat(sizes=[-1])",
        "pad(fill='noise')",
        "pad(at='middle')",
        "pad(value=True)",
        "pad(scheme='')",
        "permute(3)",
        "permute_rope(2, 'quarters')",
        "reshape([-2])",
        "slice(start=-1)",
        f"slice(stop={1 << 62})",
        "stack(None)",
        "transpose(0, 1)",
        "transpose('ab')",
        "unsqueeze(True)",
    ],
)
def test_a_field_of_another_type_is_no_adapter(text):
    with pytest.raises(RuleError):
        parse_ops(text)


INVERSES = [
    ("transpose", "transpose"),
    ("transpose((0, -1))", "transpose(dims=(0, -1))"),
    ("permute((2, 0, 1))", "permute(dims=[1, 2, 0])"),
    ("permute((-1, 0, 1))", "permute(dims=[1, 2, 0])"),
    ("permute((0, 0))", None),
    ("permute", None),
    ("chunk", "concat"),
    ("chunk(-1, [2, 3])", "concat(dim=-1, sizes=[2, 3])"),
    ("chunk(of=3)", "concat(of=3)"),
    ("chunk(index=0, of=3)", None),
    ("concat", "chunk"),
    ("concat(1, [2, 3])", "chunk(dim=1, sizes=[2, 3])"),
    ("concat(of=2)", "chunk(of=2)"),
    ("stack(1)", "unstack(dim=1)"),
    ("stack(of=2)", None),
    ("unstack(1)", "stack(dim=1)"),
    ("unstack(index=2)", None),
    ("interleave(1, 3)", "deinterleave(dim=1, parts=3)"),
    ("deinterleave", "interleave"),
    ("permute_rope(4, 'pairs')", "permute_rope(heads=4, to='halves')"),
    ("permute_rope(4, 'halves', 1)", "permute_rope(heads=4, to='pairs', dim=1)"),
    ("permute_rope(4)", None),
    ("squeeze(1)", "unsqueeze(dim=1)"),
    ("unsqueeze(-1)", "squeeze(dim=-1)"),
    ("squeeze", "reshape"),
    ("reshape", "reshape"),
    ("reshape([3, 4])", None),
    ("slice(stop=2)", None),
    ("pad", None),
    ("average", None),
    ("group_mean(heads=4)", None),
]


@pytest.mark.parametrize(("text", "undone"), INVERSES)
def test_inverses(text, undone):
    assert invert(text) == undone


OFFERS = [
    ((3, 4), (4, 3), ["transpose"]),
    ((3, 3), (3, 3), []),
    ((2, 3, 4), (4, 3, 2), []),
    ((3, 4), (12,), []),
    ((3, 4), (2, 6), []),
    ((3, 1), (1, 3), []),
    ((3, 4), (3, 4, 1, 1), ["reshape"]),
    ((1, 3), (3,), ["reshape"]),
    ((), (1,), ["reshape"]),
    ((3,), (4,), []),
]


@pytest.mark.parametrize(("source", "target", "texts"), OFFERS)
def test_only_what_no_size_could_be_mistaken_in_is_offered(source, target, texts):
    found = [op for adapter in ALL.values() if (op := adapter.offer(source, target)) is not None]
    assert [op_text(op) for op in found] == texts
    for op in found:
        assert infer(ALL[op["op"]].fill(op, FillContext((source,), target)), source) == (target,)


def test_a_transpose_is_never_applied_unasked():
    assert offers((3, 4), (4, 3), safe=True) == ()
    assert [name for name, adapter in ALL.items() if adapter.safe] == ["reshape"]


@given(weights=st.lists(st.floats(0, 1e308) | st.integers(0, 1 << 61), min_size=1, max_size=8).filter(any))
def test_weights_sum_to_one_whatever_their_size(weights):
    op = ALL["average"].fill({"op": "average", "weights": weights}, FillContext(((2,),) * len(weights)))
    assert math.fsum(op["weights"]) == pytest.approx(1, abs=1e-9)
    assert infer(op, *((2,),) * len(weights)) == ((2,),)


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1, 1], [-0.5, 1.5], [float("nan"), 1.0], [1e308, 1e308], []])
def test_a_plans_weights_must_sum_to_one(weights):
    with pytest.raises(RuleError):
        infer({"op": "average", "weights": weights}, (2,), (2,))


def chain_sizes(*sizes):
    """Every part's stretch of dim 0 by `chunk`, as a fused tensor of these sizes is taken apart."""
    total = sum(sizes)
    siblings = tuple((size, 2) for size in sizes)
    return [fill("chunk", (total, 2), target=siblings[index], index=index, of=len(sizes), siblings=siblings) for index in range(len(sizes))]


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_parts_by_the_targets_sizes_are_the_whole_without_gap_or_overlap(sizes):
    found = chain_sizes(*sizes)
    shapes = [infer(op, (sum(sizes), 2))[0] for op in found]
    assert shapes == [(size, 2) for size in sizes]
    rows = []
    for op, size in zip(found, sizes, strict=True):
        start = op["start"] if op["op"] == "slice" else op["index"] * size
        rows += range(start, start + size)
    assert rows == list(range(sum(sizes)))
