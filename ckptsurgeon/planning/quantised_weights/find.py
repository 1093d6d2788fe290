"""Finds quantised weights: tensors of codes, which have a meaning only together with their scales.

A table lists the dtypes and the names of scales of each scheme. Both must fit: an fp8 tensor without a scale is a plain value, and so is a
float weight that has a `weight_scale`. A matrix of eight bits beside a scale of any other name is codes too. In one shard
of several, the scales may be in another shard: the index names them; without an index, every tensor with a dtype for codes may have
scales. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.tensors import Checkpoint, Shard, TensorMeta

if TYPE_CHECKING:
    from ckptsurgeon.adapters.op import Op

FP8 = frozenset(code for code in BY_CODE if code.startswith("F8_"))
INTS = frozenset({"U8", "I8", "I16", "I32"})


@dataclass(frozen=True, slots=True)
class Scheme:
    """A quantisation scheme.

    Attributes:
        name: its name in messages.
        ends: the end of the codes' key.
        dtypes: the dtypes that codes may have.
        scales: what the scales' keys have in place of `ends`.
        extras: what the keys of other, optional tensors have in its place.
        divisor: set where the value is code × scale ÷ divisor.
        unless: endings of tensors with which this formula does not hold.
        same_dtype: whether the scales may have the codes' dtype.
    """

    name: str
    ends: str
    dtypes: frozenset[str]
    scales: tuple[str, ...]
    extras: tuple[str, ...] = ()
    divisor: int | None = None
    unless: tuple[str, ...] = ()
    same_dtype: bool = False


_NF4 = tuple(f".{name}" for name in ("nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"))
_ACTIVATIONS = (".input_scale", ".activation_scale", ".output_scale")
_ZERO = (".weight_zero_point",)
TABLE: tuple[Scheme, ...] = (
    Scheme("4-bit codes of bitsandbytes", "", frozenset(BY_CODE), (".absmax", ".quant_map"), _NF4, same_dtype=True),
    Scheme("8-bit codes of bitsandbytes", ".weight", frozenset({"I8"}), (".SCB",), (".weight_format",), 127),
    Scheme("codes of GPTQ or AWQ", ".qweight", INTS, (".scales",), (".qzeros", ".g_idx")),
    Scheme("packed codes of compressed-tensors", "_packed", INTS, ("_scale",), ("_shape", "_zero_point", "_g_idx", "_global_scale")),
    Scheme("MXFP4 codes", "_blocks", frozenset({"U8"}), ("_scales",), same_dtype=True),
    Scheme("MXFP4 codes", ".blocks", frozenset({"U8"}), (".scales",), same_dtype=True),
    Scheme("codes of torchao", "qdata", INTS | FP8, ("scale",), ("zero_point",)),
    Scheme("codes of quanto", "._data", INTS | FP8, ("._scale",), ("._shift",)),
    Scheme("codes of HQQ", ".W_q", INTS, (".scale",), (".zero", ".meta")),
    Scheme("codes of AQLM", ".codes", INTS, (".codebooks",), (".scales",)),
    Scheme("fp8 codes with scales", "", FP8, ("_scale_inv",), (), 1),
    Scheme("fp8 codes with scales", ".weight", FP8, (".weight_scale",), (*_ACTIVATIONS, *_ZERO), 1, _ZERO),
    Scheme("fp8 codes with scales", ".weight", FP8, (".scale_weight",), (".scale_input",), 1),
    Scheme("fp8 codes with scales", ".weight", FP8, (".scale",), (), 1),
    Scheme("fp8 codes with scales", "", FP8, ("_scale",), (), 1),
    Scheme("int8 codes with scales", ".weight", frozenset({"I8"}), (".weight_scale",), (*_ACTIVATIONS, *_ZERO), 1, _ZERO),
    Scheme("packed codes with scales", ".weight", frozenset({"U8", "I8"}), (".weight_scale_inv",)),
    Scheme("packed codes with scales", ".weight", frozenset({"U8"}), (".weight_scale",), (".weight_scale_2", *_ACTIVATIONS)),
)
_SCALES = tuple(sorted({row.scales[0].lstrip(".") for row in TABLE}))
_BY_DTYPE = tuple(row for row in TABLE if row.dtypes != frozenset(BY_CODE))  # whose dtypes alone show that a tensor may be codes
_UNSEEN = "codes whose scales may be in another shard"
_OTHER = "8-bit codes with scales"  # of no scheme of the table
EIGHT_BITS = FP8 | {"U8", "I8"}
_OF_SCALES = frozenset({"scale", "scales", "descale", "qscale", "absmax", "scb"})
_OTHERS = """weight weights w q qdata quant quantized dequant inv inverse inverted input output act activation group block channel row col
    per tensor global second fp32 f32 s 1 2"""
_AROUND = _OF_SCALES.union(_OTHERS.split())  # the words that a scale's name may have; `logit_scale` and `layer_scale` are none
_LONGEST = 64  # characters of a scale's own name
_WEIGHTS = frozenset({"weight", "kernel", "w", "q", "qweight", "codes"})  # what a module calls its matrix


@dataclass(frozen=True, slots=True)
class Codes:
    """One quantised weight.

    Attributes:
        key: the key of its codes.
        scheme: the name of its scheme.
        scales: the keys of its scales.
        extras: the keys of other tensors that belong to it.
        op: the op that computes values from codes and scale; None where no formula is known, or the shapes don't show the blocks.
        divisor: the formula's divisor, or None.
        tied: whether this is a second name of codes whose scales belong to the first name.
        whole: where the scales are, or may be, in another shard: the index or folder with all shards.
    """

    key: str
    scheme: str
    scales: tuple[str, ...]
    extras: tuple[str, ...] = ()
    op: Op | None = None
    divisor: int | None = None
    tied: bool = False
    whole: str = ""

    @property
    def own_scales(self) -> tuple[str, ...]:
        """The scales that are in this file or checkpoint."""
        return () if self.whole else self.scales

    @property
    def words(self) -> str:
        """What it is, in words that follow its key in a sentence."""
        if self.whole:
            where = f"{self.scheme} ({', '.join(self.scales)}), which are in another shard"
            return f"is {where}" if self.scales else f"may be {_UNSEEN}, as the file's name says that it is one of several"
        return f"is {self.scheme} ({', '.join(self.scales)}), no values by themselves"

    @property
    def of_target(self) -> str:
        """The same for a weight of the target."""
        return f"is {self.scheme} in the target" + (f" ({', '.join(self.scales)})" if self.scales else "")


def find(tensors: Mapping[str, TensorMeta]) -> dict[str, Codes]:
    """Every quantised weight among tensors, by its key.

    >>> meta = lambda name, dtype, shape: TensorMeta(name, dtype, shape, ())
    >>> pair = {"q.weight": meta("q.weight", "I8", (4, 2)), "q.SCB": meta("q.SCB", "F32", (4,))}
    >>> find(pair)["q.weight"].words
    'is 8-bit codes of bitsandbytes (q.SCB), no values by themselves'
    >>> find({"q.weight": meta("q.weight", "F8_E4M3", (4, 2)), "q.bias": meta("q.bias", "F32", (4,))})
    {}
    """
    shard = tensors.shard if isinstance(tensors, Checkpoint) else None
    tensors = tensors.tensors if isinstance(tensors, Checkpoint) else tensors
    rows = _that_may_be(tensors)
    weights = {}
    for key, tensor in tensors.items() if rows else ():
        scheme = next((row for row in rows if tensor.dtype in row.dtypes and _is(key, tensor, row, tensors)), None)
        if scheme is not None:
            weights[key] = _codes(key, scheme, tensors)
    weights |= {key: Codes(key, _OTHER, scales) for key, scales in _other_codes(tensors, weights)}
    weights |= _tied(weights, tensors)
    return weights if shard is None else weights | dict(_in_shards(weights, tensors, shard))


def _other_codes(tensors: Mapping[str, TensorMeta], known: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Matrices of eight bits with their scales, which continue the matrix's name, or stand in the module whose weight it is."""
    suspects = [key for key, tensor in tensors.items() if tensor.dtype in EIGHT_BITS and len(tensor.shape) > 1 and key not in known]
    of_module: dict[str, list[str]] = {}
    of_tensor: dict[str, list[str]] = {}
    for name, tensor in tensors.items() if suspects else ():
        if (BY_CODE[tensor.dtype].kind == "float" or tensor.dtype == "U8") and _OF_SCALES.intersection(_words(name)):
            module, _, leaf = name.rpartition(".")
            if _is_scale(leaf):
                of_module.setdefault(module, []).append(name)
            for at in range(max(0, len(name) - _LONGEST), len(name)):
                if name[at] in "._" and _is_scale(name[at + 1 :]):
                    of_tensor.setdefault(name[:at], []).append(name)
    for key in suspects:
        module, _, leaf = key.rpartition(".")
        names = of_tensor.get(key) or (of_module.get(module, []) if leaf.lower() in _WEIGHTS else [])
        scales = tuple(name for name in names if tensors[name].dtype != tensors[key].dtype)
        if scales:
            yield key, scales


def _is_scale(text: str) -> bool:
    return _AROUND.issuperset(_words(text)) and not _OF_SCALES.isdisjoint(_words(text))


def _words(text: str) -> list[str]:
    return text.lower().replace(".", "_").split("_")


def is_matrix(tensor: TensorMeta) -> bool:
    """Whether a tensor is what a module calls its weight, with more than one dim."""
    return len(tensor.shape) > 1 and tensor.name.rpartition(".")[2].lower() in _WEIGHTS


def _suspects(weights: Mapping[str, Codes], tensors: Mapping[str, TensorMeta]) -> Iterator[str]:
    known = {name for weight in weights.values() for name in (weight.key, *weight.scales, *weight.extras)}
    for key, tensor in tensors.items():
        if key not in known and any(tensor.dtype in row.dtypes and _ends(key, row) for row in _BY_DTYPE):
            yield key


def _in_shards(weights: Mapping[str, Codes], tensors: Mapping[str, TensorMeta], shard: Shard) -> Iterator[tuple[str, Codes]]:
    """The weights of a shard that are codes by the names in its index; without an index, those that may be codes."""
    for key in _suspects(weights, tensors):
        if shard.other_keys is None:
            yield key, Codes(key, _UNSEEN, (), whole=shard.whole)
            continue
        rows = [row for row in TABLE if tensors[key].dtype in row.dtypes and _ends(key, row)]
        for row, names in ((row, _named(key, row, row.scales)) for row in rows):
            if all(name in shard.other_keys or name in tensors for name in names) and not all(name in tensors for name in names):
                yield key, Codes(key, row.name, names, whole=shard.whole)
                break


def _tied(weights: Mapping[str, Codes], tensors: Mapping[str, TensorMeta]) -> dict[str, Codes]:
    """The other names of codes: they are the same bytes."""
    firsts = {_unnamed(tensors[key]): weight for key, weight in weights.items() if tensors[key].place is not None}
    candidates = {key: _unnamed(tensor) for key, tensor in tensors.items() if firsts and key not in weights}
    return {key: replace(firsts[unnamed], key=key, tied=True) for key, unnamed in candidates.items() if unnamed in firsts}


def _unnamed(tensor: TensorMeta) -> TensorMeta:
    return replace(tensor, name="")


def _that_may_be(tensors: Mapping[str, TensorMeta]) -> list[Scheme]:
    """The schemes for which any key ends as their scales do. Most files have none, so that no key has to be tested."""
    scales = [key for key in tensors if key.endswith(_SCALES)]
    return [row for row in TABLE if any(f".{key}".endswith(row.scales[0]) for key in scales)]


def _named(key: str, scheme: Scheme, names: Iterable[str]) -> tuple[str, ...]:
    """A key with each of `names` in place of the scheme's ending. The key may be the ending alone: a single layer's file has `qweight`."""
    stem = f".{key}".removesuffix(scheme.ends)
    return tuple((stem + name)[1:] for name in names)


def _ends(key: str, scheme: Scheme) -> bool:
    return key.endswith(scheme.ends) or key == scheme.ends[1:]


def _is(key: str, tensor: TensorMeta, scheme: Scheme, tensors: Mapping[str, TensorMeta]) -> bool:
    if not _ends(key, scheme):
        return False
    names = _named(key, scheme, scheme.scales)
    return all(name in tensors and (scheme.same_dtype or tensors[name].dtype != tensor.dtype) for name in names)


def _codes(key: str, scheme: Scheme, tensors: Mapping[str, TensorMeta]) -> Codes:
    from ckptsurgeon.adapters.quantised.dequantize import block_of

    scales = _named(key, scheme, scheme.scales)
    extras = tuple(name for name in _named(key, scheme, scheme.extras) if name in tensors)
    scale = tensors[scales[0]]
    other_formula = any(name in tensors for name in _named(key, scheme, scheme.unless))
    divisor = None if other_formula or not (BY_CODE[scale.dtype].kind == "float" or scale.dtype == "U8") else scheme.divisor
    block = None if divisor is None else block_of(tensors[key].shape, scale.shape)
    op = None if block is None else {"op": "dequantize", "block": list(block), "divisor": divisor}
    return Codes(key, scheme.name, scales, extras, op, divisor)
