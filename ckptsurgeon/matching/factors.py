"""Weights that a side holds in other tensors: factors (weight_norm, spectral_norm), codes with scales, a base layer that PEFT has wrapped.

Rule: whoever compares sees the weight that they stand for, under the name that it has in a plain layer. The links that come of it are
written for the tensors that are there, with the op that folds or unfolds them; a factor is never linked as if it were the weight.
Two files of low-rank factors alone are matched by the weights that these change: where a weight is cut along its rows, all parts share the
one factor, and the other is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptsurgeon.adapters.factors import spectral_norm, weight_norm
from ckptsurgeon.low_rank import is_factor, pairs, unwrapped, without_prefix
from ckptsurgeon.matching.module_tree import squeezed
from ckptsurgeon.planning.links import LAYOUT, Layout, Link
from ckptsurgeon.planning.quantised_weights.find import Codes, find
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
Shape = tuple[int, ...]
NOT_THE_WEIGHT = "a factor of a weight, and not the weight"
_LOW_RANK = "low rank"  # how a weight is held that no op makes of its two factors
_MXFP4 = "MXFP4"  # the same
DEQUANTIZE = "codes, of which --dequantize makes values"


@dataclass(frozen=True)
class Form:
    """A way in which torch holds a weight: what stands in place of `NAME` in a module, in the order in which the op takes it.

    Attributes:
        op: the adapter that makes the weight of them.
        names: their names; the first has the weight's shape where `whole` is 0, else the one of that number.
        dims: the dims that can be meant, by their shapes; none where they are no such factors.
        unfolds: whether the same op makes them of a weight.
        values_tell: whether the values tell the dim where the shapes do not. In torch's new form they always do, in the old one after
            some steps of training.
    """

    op: str
    names: tuple[str, ...]
    whole: int
    dims: Callable[..., tuple[int | None, ...]]
    unfolds: bool = False
    values_tell: bool = True


def _mxfp4(blocks: Shape, scales: Shape) -> tuple[int | None, ...]:
    """Where one scale stands for 16 bytes, of two codes each."""
    return (0,) if blocks == (*scales, 16) else ()


FORMS = (
    *(Form(_MXFP4, (f"{{}}{mark}blocks", f"{{}}{mark}scales"), 0, _mxfp4) for mark in "_."),
    Form("spectral_norm", ("{}_orig", "{}_u", "{}_v"), 0, spectral_norm.dims_of, values_tell=False),
    Form("weight_norm", ("{}_g", "{}_v"), 1, weight_norm.dims_of, True),
    Form("weight_norm", ("parametrizations.{}.original0", "parametrizations.{}.original1"), 1, weight_norm.dims_of, True),
    Form(
        "spectral_norm",
        ("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v"),
        0,
        spectral_norm.dims_of,
    ),
)
_TAILS = tuple(form.names[0].partition("{}")[2] for form in FORMS)


@dataclass(frozen=True)
class Factored:
    """A weight that is held in other tensors.

    Attributes:
        parts: these, in the order in which ops take them.
        op: what makes the weight of them; empty where its key has another name alone.
        unfold: what makes them of a weight; None where nothing does.
        choices: the ops between which the shapes do not decide, each with what it means; empty where they do.
    """

    parts: tuple[TensorMeta, ...]
    op: str = ""
    unfold: str | None = ""
    choices: tuple[tuple[str, str], ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of its parts."""
        return tuple(part.name for part in self.parts)

    @property
    def kind(self) -> tuple[str, tuple[Shape, ...]]:
        """What is equal for two whose parts are one another's."""
        return self.op.partition("(")[0], tuple(part.shape for part in self.parts)


@dataclass(frozen=True)
class Side:
    """One side's tensors as a plain model would have them, and those of them that are held otherwise."""

    tensors: Tensors
    factored: Mapping[str, Factored] = field(default_factory=dict)
    codes: Mapping[str, Codes] = field(default_factory=dict)

    @property
    def low_rank(self) -> bool:
        """Whether all weights are held in two factors of low rank."""
        return any(weight.op == _LOW_RANK for weight in self.factored.values())

    def stored(self, name: str) -> tuple[str, ...]:
        """The keys of the tensors that hold one of `tensors`."""
        return self.factored[name].keys if name in self.factored else (name,)

    def ties(self, groups: Iterable[Sequence[str]]) -> Iterator[list[str]]:
        """Groups of keys that are one tensor, by the names that are seen here; of factors where all are one."""
        firsts = {weight.keys[0]: name for name, weight in self.factored.items()}
        groups = list(groups)
        tied = {key for group in groups for key in group}
        for group in groups:
            names = [key for key in group if key in self.tensors]
            names += [firsts[key] for key in group if key in firsts and tied.issuperset(self.factored[firsts[key]].keys)]
            if len(names) > 1:
                yield names


def sides(source: Tensors, target: Tensors) -> tuple[Side, Side]:
    """Both sides as plain models would have them. What both hold alike under PEFT stays as it is."""
    low_rank = _low_rank(source), _low_rank(target)
    if low_rank[0] is not None and low_rank[1] is not None:
        return low_rank[0], low_rank[1]
    renamed = [unwrapped(side) for side in (source, target)]
    both = all(renamed) or any(key in other_side for names, other_side in zip(renamed, (target, source), strict=True) for key in names)
    codes = find(source), find(target)
    hidden = {} if codes[1] else codes[0]
    names = ({}, {}) if both else renamed
    return _side(source, names[0], hidden, codes[0]), _side(target, names[1], {}, codes[1])


def _low_rank(tensors: Tensors) -> Side | None:
    """A side of low-rank factors alone, and of numbers with them, as the weights that these change; None for another one."""
    factored = {name: Factored(tuple(tensors[key] for key in keys), _LOW_RANK, None) for name, keys in pairs(tensors).items()}
    of_pairs = {key: name for name, weight in factored.items() for key in weight.keys}
    if not factored or any(key not in of_pairs for key, tensor in tensors.items() if tensor.shape):
        return None
    for key, tensor in tensors.items():
        name = of_pairs.setdefault(key, without_prefix(key))
        if name not in factored and name != key:
            factored[name] = Factored((tensor,))
    plain: dict[str, TensorMeta] = {}
    for key, tensor in tensors.items():
        name = of_pairs[key]
        shapes = [part.shape for part in factored[name].parts] if tensor.shape else []
        if shapes and not (len(shapes[0]) == len(shapes[1]) > 1 and shapes[0][0] == shapes[1][1]):
            return None
        plain[name] = replace(tensor, name=name, shape=(shapes[1][0], *shapes[0][1:]) if shapes else ())
    return Side(plain, factored)


def _side(tensors: Tensors, renamed: Mapping[str, str | None], hidden: Mapping[str, Codes], codes: Mapping[str, Codes]) -> Side:
    beside = {
        name for hidden_codes in hidden.values() if hidden_codes.op is not None for name in (*hidden_codes.scales, *hidden_codes.extras)
    }
    names = {renamed.get(key, key): tensor for key, tensor in tensors.items() if key not in beside}
    seen = {name: tensor for name, tensor in names.items() if name is not None}
    groups = dict(_groups(seen))
    factored = {name: Factored((tensor,)) for name, tensor in seen.items() if name != tensor.name}
    plain: dict[str, TensorMeta] = {}
    weight_of = {name: weight for weight, (form, keys) in groups.items() for name in keys}
    for name, tensor in seen.items():
        weight = weight_of.get(name)
        if weight is None:
            dtype = "F32" if tensor.name in hidden and hidden[tensor.name].op is not None else tensor.dtype
            plain[name] = tensor if name == tensor.name and dtype == tensor.dtype else replace(tensor, name=name, dtype=dtype)
        elif weight not in plain:
            form, keys = groups[weight]
            parts = [seen[key] for key in keys]
            plain[weight] = replace(parts[form.whole], name=weight)
            if form.op == _MXFP4:
                *rows, blocks, size = plain[weight].shape
                plain[weight] = replace(plain[weight], dtype="F32", shape=(*rows, 2 * blocks * size))
            factored[weight] = _factored(form, parts)
    return Side(plain, factored, codes)


def _factored(form: Form, parts: Sequence[TensorMeta]) -> Factored:
    dims = form.dims(*(tensor.shape for tensor in parts))
    decided = len(dims) == 1 or form.values_tell
    ways = (
        (form.op, "as the values tell, refused where they do not"),
        *((f"{form.op}(dim={dim})", f"rows along dim {dim}") for dim in dims),
    )
    choices = () if decided else ways
    return Factored(tuple(parts), form.op, form.op if form.unfolds else None, choices)


def _groups(tensors: Tensors) -> Iterator[tuple[str, tuple[Form, tuple[str, ...]]]]:
    """Each weight that a side holds in factors: its name, and theirs."""
    taken: set[str] = set()
    candidates = [key for key in tensors if key.endswith(_TAILS)]
    inner = _inner(tensors) if candidates else {}
    for form in FORMS:
        for key in candidates:
            stem = _stem(key, form.names[0])
            if stem is None or key in taken:
                continue
            head, name = stem
            weight = f"{head}{name}"
            keys = tuple(head + part.format(name) for part in form.names)
            whole = all(part in tensors and part not in taken for part in keys) and weight not in tensors
            alone = inner.get(f"{head}parametrizations.{name}", len(keys)) == len(keys)
            if whole and alone and form.dims(*(tensors[part].shape for part in keys)):
                taken.update(keys)
                yield weight, (form, keys)


def _inner(tensors: Tensors) -> dict[str, int]:
    """How many tensors stand under each parametrized name: with more than a form has, it is another one, or one of several."""
    counts: dict[str, int] = {}
    for key in tensors:
        head, inside, rest = key.rpartition("parametrizations.")
        if inside and "." in rest:
            name = f"{head}{inside}{rest.partition('.')[0]}"
            counts[name] = counts.get(name, 0) + 1
    return counts


def _stem(key: str, name: str) -> tuple[str, str] | None:
    """What stands before the module's own part of a key, and the weight's name; None where it is not called so."""
    before, after = name.split("{}")
    if not key.endswith(after):
        return None
    stem = key[: len(key) - len(after)]
    if before:
        head, separator, weight = stem.rpartition(before)
        return (head, weight) if separator and weight and "." not in weight and (not head or head.endswith(".")) else None
    head, dot, weight = stem.rpartition(".")
    return (head + dot, weight) if "weight" in weight.split("_") or after[1:] == "blocks" else None


def as_stored(links: Iterable[Link], source: Side, target: Side, *, dequantize: bool = False) -> list[Link]:
    """Links between what a plain model would have, as links between what is there; `dequantize` says that values are made of codes."""
    links = list(links)
    idle = _idle(source, {key for link in links for key in link.sources}), _idle(target, {key for link in links for key in link.targets})
    checked = [_doubt_directions(_doubt_lone_factors(link, source, target), source, target, idle) for link in links]
    stored = [stored_link for link in checked for stored_link in _stored_links(link, source.factored, target.factored)]
    return [_as_codes(link, source.codes, target.codes, dequantize) for link in stored]


def _doubt_lone_factors(link: Link, source: Side, target: Side) -> Link:
    """A link, doubted where it takes a factor that is alone for a weight."""
    lone = [tuple(_part(key, side) for key in keys) for keys, side in ((link.sources, source), (link.targets, target))]
    if any(map(any, lone)) and not (lone[0] == lone[1] and len(link.sources) == len(link.targets) == 1):
        return replace(link, margin=min(link.margin, 0.0), evidence=(*link.evidence, NOT_THE_WEIGHT))
    return link


def _idle(side: Side, used: Collection[str]) -> set[tuple[str, Shape]]:
    """The modules of a side's tensors that no link has, with the shape of each."""
    return {(key.rpartition(".")[0], tensor.shape) for key, tensor in side.tensors.items() if key not in used}


def _doubt_directions(link: Link, source: Side, target: Side, idle: tuple[set[tuple[str, Shape]], set[tuple[str, Shape]]]) -> Link:
    """A link of a weight with factors of one, doubted where an idle tensor stands beside the weight in the shape of another factor: it may
    be a factor itself, under a name that does not say so."""
    if len(link.sources) == len(link.targets) == 1:
        (source_key,), (target_key,) = link.sources, link.targets
        for key, side, beside, parts in (
            (source_key, source, idle[0], target.factored.get(target_key)),
            (target_key, target, idle[1], source.factored.get(source_key)),
        ):
            shapes = {part.shape for part in parts.parts} if parts is not None and key not in side.factored else set()
            norms = [shape for shape in shapes - {side.tensors[key].shape} if len(shape) > 1]  # a bias has the shape of a vector
            if any((key.rpartition(".")[0], norm) in beside for norm in norms):
                return replace(link, margin=min(link.margin, 0.0), evidence=(*link.evidence, NOT_THE_WEIGHT))
    return link


def _stored_links(link: Link, source: Mapping[str, Factored], target: Mapping[str, Factored]) -> Iterator[Link]:
    source_weights, target_weights = [source.get(key) for key in link.sources], [target.get(key) for key in link.targets]
    if not any(source_weights) and not any(target_weights):
        yield link
        return
    if any(weight is not None and weight.op == _LOW_RANK for weight in (*source_weights, *target_weights)):
        yield from _of_low_rank(link, source, target)
        return
    if (
        len(source_weights) == len(target_weights) == 1
        and source_weights[0]
        and target_weights[0]
        and source_weights[0].kind == target_weights[0].kind
        and not link.op
    ):
        for source_key, target_key in zip(source_weights[0].keys, target_weights[0].keys, strict=True):
            layouts = tuple(replace(layout, sources=(source_key,), targets=(target_key,)) for layout in link.choices)
            yield replace(link, sources=(source_key,), targets=(target_key,), choices=layouts)
        return
    folds = {weight.op if weight is not None else "" for weight in source_weights}
    unfolds = {weight.unfold if weight is not None else "" for weight in target_weights}
    if len(folds) > 1 or len(unfolds) > 1 or None in unfolds or _MXFP4 in folds:
        return
    (fold,), (unfold,) = folds, unfolds
    if unfold and len(target_weights) > 1:
        return
    sources, targets = _keys(link.sources, source), _keys(link.targets, target)
    if (fold or unfold) and len(sources) > 1 and len(targets) > 1:
        return  # no one rule has several keys on both sides
    layouts = tuple(
        Layout(
            choice.kind, choice.words, _keys(choice.sources, source), _keys(choice.targets, target), _chain(fold, choice.op, unfold or "")
        )
        for choice in link.choices
    )
    folded = replace(link, sources=sources, targets=targets, op=_chain(fold, link.op, unfold or ""), choices=layouts)
    choices = next((weight.choices for weight in source_weights if weight is not None and weight.choices), ())
    if choices:
        dims = tuple(Layout("dim of the norm", words, sources, targets, _chain(op, link.op)) for op, words in choices)
        folded = replace(folded, doubt=LAYOUT, choices=dims)
    yield folded


def _of_low_rank(link: Link, source: Mapping[str, Factored], target: Mapping[str, Factored]) -> Iterator[Link]:
    """The links of two factors each: what a weight takes goes to all of its parts, what it gives is cut as the weight is."""
    if len(link.sources) > 1 or not {*link.sources} <= source.keys() or not {*link.targets} <= target.keys():
        return
    takes, gives = source[link.sources[0]].parts
    is_cut = len(link.targets) > 1 and link.op.startswith("chunk(dim=0")
    shared = [target[name].parts[0] for name in link.targets]
    if any(squeezed(part.shape) != squeezed(takes.shape) for part in shared):
        return  # of another rank
    link = replace(link, runner_up=_rival(link.runner_up, source, target))
    gets = [target[name].parts[1] for name in link.targets]
    if is_cut:
        yield replace(link, sources=(gives.name,), targets=tuple(part.name for part in gets))
    elif len(gets) == 1 and squeezed(gets[0].shape) == squeezed(gives.shape):
        yield _whole(link, gives, gets[0])
    else:
        return
    yield from (_whole(link, takes, part) for part in shared)


def _rival(rival: str, *sides: Mapping[str, Factored]) -> str:
    """A rival, as `source -> target`, with factors in place of the weights that no file has."""
    held = (side.get(f"{path}.weight") or side.get(path) for path, side in zip(rival.split(" -> "), sides, strict=False))
    factors = [weight.keys[0] for weight in held if weight is not None]
    return " -> ".join(factors) if len(factors) == len(sides) else rival


def _whole(link: Link, part: TensorMeta, counterpart: TensorMeta) -> Link:
    """The link of one factor for one of the other side's, of its shape but for dimensions of one."""
    return replace(link, sources=(part.name,), targets=(counterpart.name,), op="" if part.shape == counterpart.shape else "reshape")


def _keys(names: Iterable[str], factored: Mapping[str, Factored]) -> tuple[str, ...]:
    """The keys that stand for names of a plain model."""
    return tuple(key for name in names for key in (factored[name].keys if name in factored else (name,)))


def _chain(*ops: str) -> str:
    return " | ".join(op for op in ops if op)


def _as_codes(link: Link, source: Mapping[str, Codes], target: Mapping[str, Codes], dequantize: bool) -> Link:
    """A link, doubted where one side has codes and the other values, unless values are made of them."""
    source_codes, target_codes = [source[key] for key in link.sources if key in source], [key for key in link.targets if key in target]
    dequantized = dequantize and all(code.op is not None for code in source_codes)
    if bool(source_codes and not dequantized) == bool(target_codes):
        return link
    words = DEQUANTIZE if source_codes and source_codes[0].op is not None else "codes on one side alone"
    return replace(link, margin=min(link.margin, 0.0), evidence=(*link.evidence, words))


def _part(key: str, side: Side) -> str:
    """Which factor of a weight a key is, without the others; empty for none. Three letters of one stem are no factors (`weight_q`)."""
    if key in side.factored:
        return ""
    if is_factor(key):
        return "low rank"
    part = next((part for part, ends in _PARTS.items() if any(_stem(key, name) is not None for name in ends)), "")
    return "" if part and any(f"{key[:-1]}{letter}" in side.tensors for letter in "qkio") else part


_PARTS = {
    "g": ("{}_g", "parametrizations.{}.original0"),
    "v": ("{}_v", "parametrizations.{}.original1"),
    "orig": ("{}_orig", "parametrizations.{}.original"),
}
