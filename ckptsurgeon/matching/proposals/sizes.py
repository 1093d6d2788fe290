"""What a key is that both sides have in another size, and the adapters that are offered for it: by its words, its shape and its neighbours.

Rule: an adapter is offered for what a key is, never because its shape would go through it. The rows of `ROLES` are tried in order; the
first that fits says it all. What a row is sure of goes into the next command; the rest is a choice that is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, inf

from ckptsurgeon.adapters.table import offers, texts
from ckptsurgeon.adapters.vision.sizes import square_root
from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import is_float, module_of
from ckptsurgeon.planning.diff import Offer, Resize
from ckptsurgeon.rules.drafting.cover import cover
from ckptsurgeon.rules.patterns import literal
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Checkpoint, TensorMeta

Answer = tuple[str, str, bool]  # an adapter, what the key is, and whether it is sure
_OTHERWISE = """q k v qkv kv tok cls mask linear head conv proj mlp norm scale latent latents prompt prompts register registers memory query
    queries anchor anchors codebook label object objects lm out"""
_NO_POSITIONS = frozenset(_OTHERWISE.split())  # words that say what a bare table is
_CLASSES = "head classifier classification score scores logits predictor bbox cls pred outputs generator"
HEADS = frozenset(_CLASSES.split())  # words of a last layer
_IMAGE = 4  # channels of an image, or of the latents that stand for one
_BEFORE = 6  # tokens before the grid of a table of positions, at most: a class token, and others
_ROUND = (512, 256, 128, 64, 32, 16, 8)  # what vocabularies are rounded up to
_HEAD_SIZES = (128, 64, 256, 96, 80, 32, 16, 8, 4, 2)  # of one attention head, the most usual first


@dataclass(frozen=True)
class Scene:
    """Both sides, and which target keys have another size, with the source key of each."""

    source: Checkpoint
    target: Checkpoint
    pairs: Mapping[str, str]

    @cached_property
    def vocabularies(self) -> frozenset[tuple[int, int]]:
        """From how many rows to how many the token tables go."""
        tables = (Sized(self, key) for key in self.pairs)
        return frozenset((table.old[0], table.new[0]) for table in tables if table.is_token_table)

    @cached_property
    def stems(self) -> Mapping[str, tuple[int, int]]:
        """The channels of source and target, by the target's key, of the kernels to which an image may go in the source."""
        olds = {**self.target, **{key: self.source[name] for key, name in self.pairs.items()}}
        return {
            key: (old[1], new.shape[1])
            for key, new in self.target.items()
            if len(old := olds[key].shape) == len(new.shape) in (4, 5) and 1 < old[1] <= _IMAGE < old[0]
        }

    @cached_property
    def reads_text(self) -> bool:
        """Whether the target has a plain embedding, beside which no bias stands, and no kernel of an image."""
        shapes = {key: len(tensor.shape) for key, tensor in self.target.items()}
        tables = (key for key, dims in shapes.items() if dims == 2 and _own(key) == {"embed"})
        return max(shapes.values()) < 4 and any(f"{key.removesuffix('weight')}bias" not in shapes for key in tables)

    @cached_property
    def last_module(self) -> str:
        """The module of the target's last matrix or kernel."""
        last = [key for key, tensor in self.target.items() if len(tensor.shape) > 1 and is_float(tensor)]
        return last[-1].rpartition(".")[0] if last else ""


class Sized:
    """A key with its two shapes, and what its name and its neighbours say."""

    def __init__(self, scene: Scene, key: str) -> None:
        self.scene, self.key = scene, key
        self.source_key = scene.pairs[key]
        self.old, self.new = scene.source[self.source_key].shape, scene.target[key].shape
        self.module, _, self.leaf = key.rpartition(".")
        self.own = _own(key)
        self.words = _words(key)

    @property
    def rows_alone(self) -> bool:
        """Whether the first dimension alone differs."""
        return len(self.old) == len(self.new) and self.old[1:] == self.new[1:] and self.old[:1] != self.new[:1]

    @property
    def tokens_alone(self) -> bool:
        """Whether the last dimension but one alone differs."""
        old, new = self.old, self.new
        return len(old) == len(new) > 1 and (*old[:-2], old[-1]) == (*new[:-2], new[-1])

    @property
    def rows(self) -> str:
        """How many rows become how many."""
        return f"{self.old[0]:,} → {self.new[0]:,}"

    @property
    def is_token_table(self) -> bool:
        """Whether it is a table of tokens, by its own name."""
        plain = self.own - {"first", "weight"}
        named = "tok" in plain or (bool(plain) and plain <= {"embed", "shared"})
        return len(self.new) == 2 and self.rows_alone and named and not plain & {"q", "cls", "mask", "pos", "head", "out", "tokentype"}

    @property
    def of_vocabulary(self) -> bool:
        """Whether its rows are a vocabulary's: it grows along with the token table, or its name says so."""
        named = "lm" in self.own or {"embed", "out"} <= self.own
        return self.rows_alone and ((self.old[0], self.new[0]) in self.scene.vocabularies or named)

    @property
    def siblings(self) -> Iterator[tuple[str, TensorMeta]]:
        """What stands in the same module, and one module lower or higher."""
        above = self.module if self.leaf not in ("weight", "bias") else self.module.rpartition(".")[0]
        head = f"{above}." if above else ""
        return (
            (key, tensor)
            for key, tensor in self.scene.target.items()
            if key.startswith(head) and key.count(".") <= head.count(".") + 2 and key != self.key
        )

    @property
    def is_position_table(self) -> bool:
        """Whether it is a table of absolute positions: by name, or a bare (1, N, C) or (N, C) of which nothing says otherwise."""
        if "pos" in self.own or self.own & {"pe", "ape"}:
            return "relpos" not in self.own
        bare = self.leaf not in ("weight", "bias") and len(self.new) in (2, 3) and (len(self.new) == 2 or self.new[0] == 1)
        lone = f"{self.key}_bias" not in self.scene.target and f"{self.module}.bias" not in self.scene.target
        return bare and lone and not self.words & _NO_POSITIONS and len(self.new) == 3

    def _nearest(self, fits: Callable[[str, TensorMeta], bool]) -> float:
        """How many modules lower the nearest sibling stands that fits; infinite where none does."""
        return min((key.count(".") for key, tensor in self.siblings if fits(key, tensor)), default=inf)

    @cached_property
    def of_text(self) -> bool:
        """Whether a table of positions counts tokens of a text: a token table is nearer to it than any kernel of patches."""
        tables = self._nearest(lambda key, tensor: "tok" in _words(key) and len(tensor.shape) == 2)
        kernels = self._nearest(lambda _, tensor: len(tensor.shape) > 3)
        named = self.scene.reads_text or "text" in self.words or "tok" in self.words or "wpe" in self.key.split(".")
        return tables < kernels or (named and kernels == inf)

    @cached_property
    def kernel_dims(self) -> set[int]:
        """How many dimensions the kernels have that may read its input: those beside it, or else all."""
        return _kernel_dims(self.siblings) or _kernel_dims(self.scene.target.items())

    @property
    def of_image(self) -> bool:
        """Whether a table of positions is surely one of a square grid: a bare one, or a kernel of two dimensions is in the model, and what
        reads the input beside it has no other number of dimensions."""
        bare = self.leaf not in ("weight", "bias") and len(self.new) > 2
        return 4 in self.kernel_dims or (bare and not self.kernel_dims)

    @property
    def is_first_convolution(self) -> bool:
        """Whether it is a kernel that sees the image, or what stands for it: no other as near to the input has few channels that stay or
        change otherwise. What is in fewer numbered lists is nearer."""
        channels, depth = (self.old[1], self.new[1]), _depth(self.key)
        others = (change for key, change in self.scene.stems.items() if key != self.key and _depth(key) <= depth)
        return (self.new[0] > _IMAGE or max(channels) <= _IMAGE) and all(change == channels for change in others)

    @property
    def is_depthwise(self) -> bool:
        """Whether it is, on one side, a kernel of one group for each channel of the other."""
        few, many = sorted((self.old[1], self.new[1]))
        return few == 1 and self.new[0] % many == 0 and (many > _IMAGE or many == self.new[0])

    @property
    def is_head(self) -> bool:
        """Whether its rows are classes: a head by its name, or the last module of the model."""
        named = bool({*self.own, *self.words} & {"head"}) or bool(self.own & HEADS)
        return self.rows_alone and (named or (self.module == self.scene.last_module and not self.own & {"q", "k", "v"}))


def _kernel_dims(tensors: Iterable[tuple[str, TensorMeta]]) -> set[int]:
    """The dimensions of kernels, without those of one channel in numbered lists, which are depthwise."""
    kernels = [(key, tensor.shape) for key, tensor in tensors if key.endswith("weight") and len(tensor.shape) > 2]
    return {len(shape) for key, shape in kernels if 1 not in shape[:2] or not any(map(str.isdigit, key.split(".")))}


def _depth(key: str) -> int:
    """In how many numbered lists a key stands."""
    return sum(map(str.isdigit, key.split(".")))


def _own(key: str) -> frozenset[str]:
    """The words of the last part of a name that is no weight or bias."""
    parts = [part for part in key.split(".") if part not in ("weight", "bias")]
    return _words(parts[-1]) if parts else frozenset()


def _words(text: str) -> frozenset[str]:
    return frozenset(word for word in concepts(text) if word[0] != "#")


def _by_shape(sized: Sized, *names: str) -> str:
    """The adapter of these that makes its shape fit, or nothing."""
    return next((texts([op]) for op in offers(sized.old, sized.new) if op["op"] in names), "")


def _fresh(sized: Sized, dim: str = "") -> tuple[str, str]:
    """What fills a table up, and in words: what the target has there, or, where nothing gives it, the mean of the rows."""
    target = sized.scene.target
    values = target.kind == "file" or (target.kind == "model" and target.in_memory != "state_dict")
    fill, words = ("init", "as the target has them") if values else ("mean", "their mean")
    return f'pad({dim}fill="{fill}")', words


def _relative(sized: Sized) -> Iterable[Answer] | None:
    if "relpos" not in sized.own:
        return None
    adapter = _by_shape(sized, "relative_position_bias")
    return [(adapter, "biases of relative positions, resized to the new window", True)] if adapter else [("", "relative positions", False)]


def _rounded(old: int, new: int) -> bool:
    """Whether a vocabulary's size is the other's rounded up, as libraries do for speed."""
    return any(old % step == 0 and 0 < old - new < step for step in _ROUND)


def _vocabulary(sized: Sized) -> Iterable[Answer] | None:
    if not (sized.is_token_table or sized.of_vocabulary):
        return None
    kind = "vocabulary" if sized.is_token_table else "output of the vocabulary"
    if sized.new[0] > sized.old[0]:
        adapter, rest = _fresh(sized)
        return [(adapter, f"{kind}, {sized.rows}: the old rows are kept, the rest {rest}", True)]
    rounded = _rounded(sized.old[0], sized.new[0])
    words = f"{kind}, {sized.rows}: " + (
        "rounded up in the source" if rounded else "its first rows, where the tokens are the same (else rows, by lists of tokens)"
    )
    return [("slice", words, rounded)]


def _positions(sized: Sized) -> Iterable[Answer] | None:
    if not sized.is_position_table:
        return None
    if not sized.of_text:
        adapter = _on_grid(sized)
        if not adapter and (same_grid := _of_one_grid(sized)):
            return [(*same_grid, False)]
        how = "resized to the new grid" if adapter else "of another grid"
        return [(adapter, f"table of positions, {how}", bool(adapter) and sized.of_image)]
    if not (sized.rows_alone or sized.tokens_alone):
        return [("", "table of positions", False)]
    dim = 0 if sized.rows_alone else len(sized.new) - 2
    words = f"positions of a text, {sized.old[dim]:,} → {sized.new[dim]:,}"
    if sized.new[dim] > sized.old[dim]:
        adapter, rest = _fresh(sized, f"dim={dim}, " if dim else "")
        return [(adapter, f"{words}: the old ones are kept, the rest {rest}", True)]
    return [(f"slice(dim={dim})" if dim else "slice", f"{words}: the first ones", True)]


def _on_grid(sized: Sized) -> str:
    """The adapter for another grid, or nothing: of a line or a cube where the kernels beside it say so."""
    if sized.kernel_dims not in ({3}, {5}) or not sized.tokens_alone:
        return _by_shape(sized, "interpolate")
    old, new = sized.old[-2], sized.new[-2]
    if sized.kernel_dims == {3}:
        return f"interpolate(grid=[1, {old}], to=[1, {new}])"
    a, b = (round(count ** (1 / 3)) for count in (old, new))
    if (a**3, b**3) != (old, new):
        return ""
    plane, cube = f"reshape(shape=[{b}, {a * a}, {sized.new[-1]}])", f"reshape(shape={list(sized.new)})"  # the first side, then the others
    return f"interpolate(grid=[{a}, {a * a}], to=[{b}, {a * a}]) | {plane} | interpolate(grid=[{a}, {a}], to=[{b}, {b}]) | {cube}"


def _of_one_grid(sized: Sized) -> tuple[str, str] | None:
    """The adapter, or nothing, and words for tables of one square grid that differ in the tokens before it: a class token, registers."""
    if not sized.tokens_alone:
        return None
    old, new = sized.old[-2], sized.new[-2]
    left = next((count for count in range(_BEFORE) if square_root(min(old, new) - count) is not None), _BEFORE)
    if left + abs(old - new) > _BEFORE:
        return None
    words = f"table of positions, of one grid, with {abs(old - new)} {'fewer' if new < old else 'more'} in front of it in the target"
    return (f"slice(dim={len(sized.old) - 2}, start={old - new})" if new < old and not left else ""), words


def _first_convolution(sized: Sized) -> Iterable[Answer] | None:
    if len(sized.old) != len(sized.new) or len(sized.new) not in (4, 5):
        return None
    if (min(sized.old[1], sized.new[1]) > _IMAGE and not sized.own & {"patch", "stem"}) or sized.is_depthwise:
        return None
    channels, first = _by_shape(sized, "in_channels"), sized.is_first_convolution
    words = f"{'first convolution' if first else 'kernel'}, {sized.old[1]} → {sized.new[1]} channels"
    if channels:
        return [(channels, words, first)]
    if (sized.old[0], *sized.old[2:]) == (sized.new[0], *sized.new[2:]):
        grows = sized.new[1] > sized.old[1]
        adapter = "pad(dim=1)" if grows else "slice(dim=1)"
        how = "the new ones zero" if grows else "the first ones"
        return [(adapter, f"{words}, {how}", False)]
    patch = _by_shape(sized, "patch_embed")
    return [(patch, "patches of another size", True)] if patch else None


def _more_dims(sized: Sized) -> Iterable[Answer] | None:
    adapter = _by_shape(sized, "inflate")
    return [(adapter, "2-D kernel for a 3-D convolution", True)] if adapter else None


def _grouped(sized: Sized) -> Iterable[Answer] | None:
    if not (sized.own & {"k", "v"} and sized.rows_alone and sized.new[0] and sized.old[0] % sized.new[0] == 0):
        return None
    both = gcd(sized.old[0], sized.new[0])
    size = next((size for size in _HEAD_SIZES if both % size == 0), 1)
    words = f"fewer key and value heads: the mean of each group (of {sized.old[0] // sized.new[0]}), if its heads have {size} rows"
    return [(f"group_mean(heads={sized.old[0] // size})", words, False)]


def _classes(sized: Sized) -> Iterable[Answer] | None:
    return [("", f"a head of other classes, {sized.rows}: stays as the target has it", False)] if sized.is_head else None


def _turned(sized: Sized) -> Iterable[Answer] | None:
    """A layer of as many outputs; without a bias that says so, it is not sure for one alone, which may be of another size."""
    scene, adapter = sized.scene, _by_shape(sized, "transpose")
    biases = scene.source.get(f"{module_of(sized.source_key)}.bias"), scene.target.get(f"{sized.module}.bias")
    outputs = {bias.shape for bias in biases if bias}
    if not adapter or len(outputs) > 1:
        return None
    exchanged = sum(scene.source[name].shape == scene.target[key].shape[::-1] for key, name in scene.pairs.items())
    return [(adapter, "rows and columns exchanged", all(biases) or exchanged > 1)]


ROLES: tuple[Callable[[Sized], Iterable[Answer] | None], ...] = (
    _turned,
    _relative,
    _positions,
    _vocabulary,
    _first_convolution,
    _more_dims,
    _grouped,
    _classes,
)


def resizes(source: Checkpoint, target: Checkpoint, pairs: Mapping[str, str], renamed: Mapping[str, str] = {}) -> tuple[Resize, ...]:
    """What each key of another size is, with the rules that make it fit; `pairs` are the source's keys by the target's, `renamed` those
    that have another name too, which is never sure.

    Of keys about which nothing is known, and of values that are counted or indexed, nothing is said.
    """
    scene = Scene(source, target, {**pairs, **renamed})
    floats = [key for key, name in scene.pairs.items() if is_float(target[key]) and is_float(source[name])]
    alike: dict[tuple[str, str, bool], list[Offer]] = {}
    apart = []
    for offer in (offer for key in floats for offer in _of(Sized(scene, key))):
        if offer.key not in renamed:
            alike.setdefault((offer.adapter, offer.role, offer.sure), []).append(offer)
        elif offer.adapter:
            rule = Rule("adapt", f"{literal(renamed[offer.key])} -> {literal(offer.key)}", offer.adapter)
            apart.append(Resize((replace(offer, sure=False),), (rule,)))
    return (*(Resize(tuple(same), tuple(_rules(same, target))) for same in alike.values()), *apart)


def _rules(same: Sequence[Offer], target: Checkpoint) -> Iterator[Rule]:
    """The adapter for each of these keys, and for no other."""
    if same[0].adapter:
        named = {offer.key: None for offer in same}
        for pattern in cover(named, [key for key in target if key not in named]):
            yield Rule("adapt", pattern, same[0].adapter)


def _of(sized: Sized) -> Iterator[Offer]:
    for op in offers(sized.old, sized.new, safe=True):
        yield Offer(sized.key, sized.old, sized.new, texts([op]), "dimensions of size 1", True, True)
        return
    answers: Sequence[Answer] = next((list(answer) for role in ROLES if (answer := role(sized)) is not None), [])
    for adapter, words, sure in answers:
        yield Offer(sized.key, sized.old, sized.new, adapter, words, sure)
