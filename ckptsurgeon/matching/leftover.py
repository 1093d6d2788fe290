"""What is left over of two modules that go together, units only: look-alikes among themselves, then parts that are fused, split or turned.

Rule: where more units of a shape may come from outside, nothing is decided here. A pair that is one only because nothing else is left
needs a name that speaks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ckptsurgeon.matching.choose import Choice, choose
from ckptsurgeon.matching.evidence.score import Clues
from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts, conflict, said
from ckptsurgeon.matching.fusing import fuse
from ckptsurgeon.matching.module_tree import Node, Shape
from ckptsurgeon.matching.pairing import Laid, Left, laid, under
from ckptsurgeon.planning.links import ENOUGH

UNSAID = "names do not say so"
BUT_FOR_A_BIAS = "called so, and of that shape, where one has a bias"
_SAID = 2  # words in common along both paths, and that both are a bias, that speak for a pair where the last words do not


@dataclass(frozen=True)
class Surroundings:
    """Where units are left over.

    Attributes:
        above: the choice of the modules that they are in.
        exact: whether these modules hold the same.
        top: whether they are the whole of both sides.
        balanced: the forms of units that both sides have equally often, everywhere.
    """

    above: Choice
    exact: bool
    top: bool
    balanced: frozenset[int]


def pair_leftovers(left: Left, surroundings: Surroundings, clues: Clues) -> tuple[list[Laid], Left]:
    """Pair what can be paired of what is left over; the rest may be tried again one level higher."""
    sources = [unit for node in left.sources for unit in node.units()]
    targets = [unit for node in left.targets for unit in node.units()]
    placed = _look_alikes(sources, targets, replace(surroundings, top=False), clues)
    sources, targets = _without(sources, targets, placed)
    placed += _but_for_a_bias(sources, targets, surroundings.above)
    sources, targets = _without(sources, targets, placed)
    for fused in fuse(sources, targets, clues, surroundings.top):
        rival = surroundings.above.runner_up if surroundings.above.margin < fused.margin else None
        placed.append(Laid(fused.sources, fused.targets, min(surroundings.above.margin, fused.margin), fused.evidence, rival))
    sources, targets = _without(sources, targets, placed)
    placed += _look_alikes(sources, targets, surroundings, clues)  # of whose shape others were parts
    sources, targets = _without(sources, targets, placed)
    doubted = [at for at, pair in enumerate(placed) if UNSAID in pair.evidence]
    forms = {placed[at].sources[0].form for at in doubted}
    if len(forms) == len(doubted) and not any(node.size for node in (*sources, *targets)):
        for at in doubted:
            margin = min(surroundings.above.margin, ENOUGH)
            placed[at] = replace(placed[at], margin=margin, evidence=("all that is left on both sides",))
    return placed, Left(tuple(sources), tuple(targets))


def _look_alikes(sources: Sequence[Node], targets: Sequence[Node], surroundings: Surroundings, clues: Clues) -> list[Laid]:
    """Pairs of units of equal form."""
    by_form: dict[int, tuple[list[Node], list[Node]]] = {}
    for side, nodes in enumerate((sources, targets)):
        for node in nodes:
            by_form.setdefault(node.form, ([], []))[side].append(node)
    choices = [choice for form, (ones, others) in by_form.items() for choice in _among(form, ones, others, surroundings, clues)]
    return [laid(under(choice, surroundings.above)) for choice in choices]


def _but_for_a_bias(sources: Sequence[Node], targets: Sequence[Node], above: Choice) -> list[Laid]:
    """Pairs of units that differ in a bias alone, of which each is the only one of its shape and its name on its side."""
    sides: tuple[dict[tuple[Shape, frozenset[str]], list[Node]], ...] = ({}, {})
    for side, nodes in zip(sides, (sources, targets), strict=True):
        for node in nodes:
            if words := _last_word(node) - SAYS_NOTHING:
                side.setdefault((node.largest.shape, words), []).append(node)
    pairs = [(sides[0][key], sides[1][key]) for key in sides[0] if key in sides[1] and len(key[0]) > 1]
    return [
        laid(under(Choice(ones[0], others[0], ENOUGH, (BUT_FOR_A_BIAS,)), above))
        for ones, others in pairs
        if len(ones) == len(others) == 1 and ones[0].tensors.keys() ^ others[0].tensors.keys() == {"bias"}
    ]


def _among(form: int, sources: Sequence[Node], targets: Sequence[Node], surroundings: Surroundings, clues: Clues) -> list[Choice]:
    """The pairs of units of one form, or none where they can't be told yet."""
    if not sources or not targets or not sources[0].size:
        return []
    choices = choose(sources, targets, clues)
    if len(sources) == len(targets) == 1:
        return choices if surroundings.exact else [_doubted(choices[0], clues)]
    if (
        len(sources) != len(targets)
        and not surroundings.top
        and (form in surroundings.balanced or any(choice.margin < ENOUGH for choice in choices))
    ):
        return []  # higher up there are, or may be, more of them
    return choices


def _doubted(choice: Choice, clues: Clues) -> Choice:
    """The only one left of its shape, from modules that are not equal: names must speak for it, or the convolutions before it."""
    source_words, target_words = said(choice.source.path), said(choice.target.path)
    if conflict(source_words, target_words):
        return replace(choice, margin=-1.0, evidence=(*choice.evidence, "names against it"))
    running = "running_var" in choice.source.tensors and set(choice.source.tensors) == set(choice.target.tensors)
    if (
        running
        or len(choice.source.main) > 1
        or clues.behind_the_same(choice.source, choice.target)
        or clues.with_the_same(choice.source, choice.target)
        or _last_word(choice.source) & _last_word(choice.target)
        or _said(source_words & target_words) + (_roles(choice.source) == _roles(choice.target) == {"bias"}) >= _SAID
    ):
        return choice
    return replace(choice, margin=0.5, evidence=(*choice.evidence, UNSAID))


def _said(words: frozenset[str]) -> int:
    return len({word for word in words if word[0] != "#"} - SAYS_NOTHING)


def _roles(node: Node) -> set[str]:
    """The roles of a unit's tensors; a parameter by itself that is called a bias of something is a bias."""
    return {word for role in node.tensors for word in concepts(role)[-1:]}


def _last_word(node: Node) -> frozenset[str]:
    """What the last part of a path says that is not a number alone."""
    parts = [part for part in node.path.split(".") if not part.isdigit()]
    return frozenset(word for word in concepts(parts[-1]) if word[0] != "#") if parts else frozenset()


def _without(sources: Sequence[Node], targets: Sequence[Node], placed: Iterable[Laid]) -> tuple[list[Node], list[Node]]:
    done = {id(node) for pair in placed for node in (*pair.sources, *pair.targets)}
    return [node for node in sources if id(node) not in done], [node for node in targets if id(node) not in done]
