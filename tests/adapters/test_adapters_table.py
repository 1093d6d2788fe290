"""Every adapter, one by one: what its table line promises holds, so that a new one needs its own module, its line, and its case here.

Oracles: torch.optim.Adam says what an adapted weight's moments would be, the whole kernel what parts of it give.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import prod
from pathlib import Path
from types import SimpleNamespace

import adapters_support as support
import pytest
import torch
from adapters_support import Case, cases, run, same
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors.torch import load_file, save_file

import ckptsurgeon as cs
from ckptsurgeon.adapters.chain import check_fields, filled_elements
from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, cannot_follow, each, same_op, signed, zeros_where_filled
from ckptsurgeon.adapters.table import ADAPTERS, adapter_of, load, offers, parse_ops
from ckptsurgeon.errors import RuleError
from ckptsurgeon.optimizer.plan import moment_ops
from ckptsurgeon.planning.planfile import to_json
from ckptsurgeon.rules.reversing import reverse
from ckptsurgeon.rules.rules import Rule

PACKAGE = Path(cs.__file__).parent
NAMES = list(ADAPTERS)
every = pytest.mark.parametrize("name", NAMES)
some = settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))


@every
def test_an_adapter_says_what_it_is_and_shows_it(name: str) -> None:
    adapter = load(name)
    assert adapter.words and "\n" not in adapter.words
    assert set(adapter.plan_only) <= set(adapter.fields) and all(map(callable, adapter.fields.values()))
    assert adapter.moments in (same_op, zeros_where_filled, cannot_follow)
    assert (adapter.moments is cannot_follow) == (adapter.floats or adapter.decodes)
    assert not (adapter.ranges and adapter.moments is cannot_follow)  # what moves bytes only takes the moments along
    module = importlib.import_module(f"ckptsurgeon.adapters.{ADAPTERS[name]}")
    assert getattr(module, name.upper()) is adapter
    assert f"`{name}`" in module.__doc__ and f"{name.upper()}.kernel(" in module.__doc__
    assert doctest.testmod(module).failed == 0


def initial_of(shape: Shape, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: torch.full(shape, -7.0, dtype=dtype)


def made(op: Op, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    shapes = adapter_of(op).infer(op, tuple(map(support.shape_of, tensors)))
    return run(op, *tensors, initial=initial_of(shapes[0], tensors[0].dtype))


@every
@some
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), turned=st.booleans())
def test_shapes_are_what_the_kernel_makes(name: str, data: st.DataObject, dtype: torch.dtype, turned: bool) -> None:
    case = data.draw(cases(name))
    tensors = [tensor.mT.contiguous().mT if turned and tensor.dim() > 1 else tensor for tensor in case.tensors(dtype)]
    for index, shape in enumerate(case.results):
        op = case.op(index)
        check_fields(op)
        found = made(op, tensors)
        assert shape is None or [support.shape_of(one) for one in found] == [shape] * len(found)


anything = st.one_of(
    st.integers(0, 9),
    st.lists(st.integers(0, 4), max_size=4),
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), max_size=3),
    st.sampled_from(
        ["start", "end", "zeros", "mean", "init", "none", "center", "nearest", "bicubic", "channels_first", "halves", True, False]
    ),
)


@every
@some
@given(data=st.data())
def test_an_edited_op_is_refused_or_the_kernel_makes_its_shapes(name: str, data: st.DataObject) -> None:
    """Fields and shapes that were changed in a plan: whatever `infer` accepts, the kernel can do."""
    case = data.draw(cases(name))
    op, shapes = dict(case.op()), [list(shape) for shape in case.shapes]
    adapter = adapter_of(op)
    for field in data.draw(st.lists(st.sampled_from(list(adapter.fields)), max_size=2)):
        op[field] = data.draw(anything)
    if data.draw(st.booleans()) and shapes[0]:
        shapes[0][data.draw(st.integers(0, len(shapes[0]) - 1))] = data.draw(st.integers(0, 4))
    tensors = Case(case.rule, tuple(map(tuple, shapes))).tensors()
    try:
        check_fields(op)
        found = adapter.infer(op, tuple(map(tuple, shapes)))
    except RuleError:
        return
    run(op, *tensors, initial=lambda: torch.zeros(found[0], dtype=torch.float64))


junk = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.sampled_from([-1, 1 << 30, (1 << 62) - 1, -(1 << 61), 1 << 400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)
any_shape = st.lists(st.integers(0, 9) | st.just(1 << 61), max_size=5).map(tuple)


@every
@settings(some, max_examples=examples(100))
@given(data=st.data())
def test_no_op_does_worse_than_a_rule_error(name: str, data: st.DataObject) -> None:
    """Of a rule or of a plan, with any fields, shapes and target."""
    case = data.draw(cases(name))
    shapes = data.draw(st.just(case.shapes) | st.lists(any_shape, max_size=4).map(tuple))
    adapter, known = load(name), {**case.op(), **case.rule}
    op = {"op": name, **{field: known[field] for field in adapter.fields if field in known and data.draw(st.integers(0, 9))}}
    op |= {field: data.draw(anything | junk) for field in data.draw(st.lists(st.sampled_from(list(adapter.fields)), max_size=2))}
    with suppress(RuleError):
        check_fields(op)
        assert all(type(size) is int and size >= 0 for shape in adapter.infer(op, shapes) for size in shape)
    rule = {field: op[field] for field in op if field == "op" or (field not in adapter.plan_only and adapter.fields[field](op[field]))}
    undone = adapter.invert(rule)
    assert undone is None or check_fields(undone) is None
    results = data.draw(st.just(case.results) | st.lists(st.none() | any_shape, min_size=1, max_size=4).map(tuple))
    number, index = data.draw(st.none() | st.integers(0, 9)), data.draw(st.integers(0, len(results) - 1))
    with suppress(RuleError):
        filled = adapter.fill(rule, FillContext(shapes, results[index], index, len(results), results, number))
        found = adapter_of(filled).infer(filled, shapes)
        check_fields(filled)
        assert adapter_of(filled).infer(json.loads(json.dumps(filled)), shapes) == found


@settings(some, max_examples=examples(400))
@given(source=st.lists(st.integers(0, 30), max_size=5).map(tuple), data=st.data())
def test_what_is_offered_makes_the_target(source: Shape, data: st.DataObject) -> None:
    target = [data.draw(st.just(size) | st.sampled_from([1, 3, 4, 9, 16, 17, 25])) for size in source]
    target = data.draw(st.just(target) | st.permutations(target))
    if data.draw(st.booleans()):
        target.insert(data.draw(st.integers(0, len(target))), data.draw(st.integers(0, 4)))
    for op in offers(source, tuple(target)):
        filled = adapter_of(op).fill(op, FillContext((source,), tuple(target)))
        assert adapter_of(filled).infer(filled, (source,)) == (tuple(target),)


@every
@some
@given(data=st.data())
def test_a_reversed_op_gives_back_what_went_in(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    back = case.adapter.invert(case.rule)
    if back is None:
        return
    shapes = case.shapes if case.adapter.joins else case.shapes[:1]
    case = Case(case.rule, shapes, case.results)
    tensors = case.tensors()
    there = [made(case.op(index), tensors)[0] for index in range(len(case.results))]
    between = tuple(map(support.shape_of, there))
    assume(not case.adapter.joins or len(shapes) > 1)  # the one part of a tensor is no part
    try:
        again = [made(support.filled_for(back, between, shapes, index), there) for index in range(len(shapes))]
    except RuleError:
        assert sum(map(prod, between)) < sum(map(prod, shapes))  # the rule left something behind, and its way back says so
        return
    assert all(len(row) == 1 for row in again)
    assert all(same(row[0], tensor) for row, tensor in zip(again, tensors, strict=True))


@every
@some
@given(data=st.data())
def test_what_moves_bytes_only_is_what_the_kernel_makes(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    op, tensors = case.op(data.draw(st.integers(0, len(case.results) - 1))), case.tensors()
    ranges = adapter_of(op).ranges
    if ranges is None:
        return
    rows = ranges(op, case.shapes)
    for row, tensor in zip(rows, made(op, tensors), strict=True):
        if row is not None:
            parts = [tensors[at].flatten()[start:stop] for at, start, stop in row]
            assert same(torch.cat(parts), tensor.flatten())


MOVED: dict[str, Op] = {
    "reshape": {"shape": [2, -1]},
    "squeeze": {},
    "unsqueeze": {"dim": 1},
    "slice": {"dim": 0, "start": 1, "stop": 3},
    "concat": {"dim": 0, "of": 2},
    "chunk": {"dim": 0, "index": 0, "of": 1},
    "stack": {"dim": 0, "of": 2},
    "unstack": {"dim": 0, "index": 0},
    "rows": {"dim": 0, "rows": 1, "runs": [[0, 0, 1]], "fill": "none"},
}


def test_what_moves_bytes_only_does_so_along_the_first_dim() -> None:
    assert [name for name in NAMES if load(name).ranges] == list(MOVED)
    for name, op in MOVED.items():
        assert load(name).ranges({"op": name, **op}, ((3, 2), (1, 2)))[0]  # type: ignore[misc]


def copied(op: Op, tensors: list[torch.Tensor]) -> torch.Tensor:
    """(elements that come out, elements that come in): 1 where one is the other; found by changing one element after the other by 1."""
    given = [torch.zeros_like(tensor) for tensor in tensors]
    base, columns = made(op, given)[0].flatten().clone(), []
    for tensor in given:
        for place in range(tensor.numel()):
            tensor.view(-1)[place] = 1
            columns.append(made(op, given)[0].flatten() - base)
            tensor.view(-1)[place] = 0
    whole = torch.stack(columns, 1)
    return whole * ((whole == 1).sum(1) == 1)[:, None]


def adam(value: torch.Tensor, gradients: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state that Adam keeps of a parameter after some steps."""
    parameter = torch.nn.Parameter(value.clone())
    optimizer = torch.optim.Adam([parameter], amsgrad=True)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return {key: one for key, one in optimizer.state[parameter].items() if key != "step"}


@every
@some
@given(data=st.data(), seed=st.integers(0, 99))
def test_moments_are_what_adam_would_have_kept_of_the_adapted_weight(name: str, data: st.DataObject, seed: int) -> None:
    """Two trainings of the same gradients, before the adapter and after it; what is filled up has seen no gradient yet."""
    case = data.draw(cases(name))
    op = case.op()
    following = adapter_of(op).moments(op)
    if following is None:
        return
    check_fields(following)
    tensors = case.tensors()
    assume(op.get("fill") != "mean" or case.shapes[0][op["dim"]] > 1)  # the mean of one row is that row
    chosen = copied(op, tensors)
    out = adapter_of(op).infer(op, case.shapes)[0]
    assert filled_elements([op], out) == int((chosen.sum(1) == 0).sum())
    torch.manual_seed(seed)
    gradients = [[torch.randn_like(tensor) for tensor in tensors] for _ in range(2)]
    flat = [torch.cat([one.flatten() for one in step]) for step in gradients]
    wanted = adam(torch.zeros(out, dtype=torch.float64), [(chosen @ one).reshape(out) for one in flat])
    held = [adam(tensor, [step[at] for step in gradients]) for at, tensor in enumerate(tensors)]
    for slot, moment in wanted.items():
        found = run(following, *[state[slot] for state in held])[0]
        torch.testing.assert_close(found, moment, rtol=1e-12, atol=1e-12)


@every
@some
@given(data=st.data())
def test_parts_of_a_result_are_what_the_whole_has_there(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    op, tensors = case.op(), case.tensors()
    adapter = adapter_of(op)
    start = data.draw(st.integers(0, 3))
    if adapter.elementwise:
        flat = [tensor.flatten()[start : start + 2] for tensor in tensors]
        if len(flat[0]):
            assert same(run(op, *flat)[0], made(op, tensors)[0].flatten()[start : start + 2])
    if adapter.by_rows is not None:
        first, *others = tensors
        found = adapter.by_rows(op, [first[start : start + 2], *others], case.shapes[0], start)
        assert same(found, made(op, tensors)[0][start : start + 2])


def test_an_elementwise_join_has_no_shape_that_tells_how_many_went_in() -> None:
    for adapter in map(load, NAMES):
        assert not adapter.elementwise or adapter.joins
    assert [name for name in NAMES if load(name).joins] == ["concat", "stack", "average", "weight_norm", "spectral_norm"]


# --- adding one


FLIP = Adapter(
    words="turns dim `dim` round: out[i] = in[n - 1 - i]",
    fields={"dim": signed},
    infer=lambda _op, shapes: shapes,
    fill=lambda op, _place: {"dim": 0, **op},
    kernel=each(lambda op, tensor: tensor.flip(op["dim"])),
    moments=same_op,
    invert=lambda op: op,
)


def test_adding_an_adapter_takes_its_module_and_a_line_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a rule to a file, a plan, the way back and an optimizer's moments: nobody else has to know its name."""
    monkeypatch.setitem(sys.modules, "ckptsurgeon.adapters.layout.flip", SimpleNamespace(FLIP=FLIP))
    monkeypatch.setitem(ADAPTERS, "flip", "layout.flip")
    save_file({"w": torch.arange(6.0).view(3, 2)}, tmp_path / "a.safetensors")
    cs.merge(tmp_path / "a.safetensors", None, tmp_path / "b.safetensors", adapt={"w -> v": "flip"})
    assert load_file(tmp_path / "b.safetensors")["v"].tolist() == [[4, 5], [2, 3], [0, 1]]
    planned = cs.plan(tmp_path / "a.safetensors", tmp_path / "a.safetensors", adapt={"w -> w": "flip(1)"})
    (tmp_path / "plan.json").write_text(json.dumps(to_json(planned)))
    cs.apply(tmp_path / "plan.json", tmp_path / "c.safetensors")
    assert load_file(tmp_path / "c.safetensors")["w"].tolist() == [[1, 0], [3, 2], [5, 4]]
    assert reverse([Rule("adapt", "w -> v", "flip(dim=1)")]) == (Rule("adapt", "v -> w", "flip(dim=1)"),)
    assert moment_ops([{"op": "flip", "dim": 0}]) == ({"op": "flip", "dim": 0},)
    with pytest.raises(RuleError, match="there is no adapter 'flop'") as error:
        parse_ops("flop")
    assert "is it flip" in str(error.value.hint)


def test_nobody_asks_for_an_adapters_name() -> None:
    """Outside of its module an adapter's name is written only to ask for that op; what it does, its traits say."""

    def words(nodes: Iterable[ast.AST]) -> list[str]:
        return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]

    asking = []
    for path in {*PACKAGE.rglob("*.py")} - {*PACKAGE.glob("adapters/*/*.py")}:
        for node in ast.walk(ast.parse(path.read_text())):
            compared = isinstance(node, ast.Compare) and "op" in ast.unparse(node) and {*words(ast.walk(node))} & {*ADAPTERS}
            listed = words(node.elts) if isinstance(node, ast.Set | ast.Tuple | ast.List) else []
            if compared or (len(listed) > 1 and {*listed} <= {*ADAPTERS}):
                asking.append(f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}")
    assert asking == []
