"""The results as JSON values, each with `"version": 1`; their schemas are in `schemas/`. Keys are only ever added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from json import JSONEncoder, dumps
from math import inf, prod
from typing import TYPE_CHECKING, Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.tensors import Refused

if TYPE_CHECKING:
    from ckptsurgeon.command import Command
    from ckptsurgeon.errors import CheckpointError
    from ckptsurgeon.finding_codes import Code
    from ckptsurgeon.matching.proposals.propose import Proposal
    from ckptsurgeon.planning.diff import Diff, Resize
    from ckptsurgeon.planning.links import Link
    from ckptsurgeon.planning.own_loading.conversions import Applied
    from ckptsurgeon.planning.prefixes.rivals import Way
    from ckptsurgeon.planning.quantised import Codes
    from ckptsurgeon.report import CarriedState, Cast, CheckReport, Coverage, Finding, Report, Twins, Verification
    from ckptsurgeon.rules.rules import Rule
    from ckptsurgeon.tensors import Archive, TensorMeta
    from ckptsurgeon.views.modules import Module

VERSION = 1
_NO_PREFIX = {"stripped": "", "added": "", "unwrapped": []}


class Rows(list[dict[str, Any]]):
    """A list that makes each tensor's row on iteration, since a million rows would take a quarter of a gigabyte.

    json writes it whole with an `indent` only: without one it looks past `__iter__`. `texts` writes it ten times as fast.
    """

    def __init__(self, tensors: Mapping[str, TensorMeta]) -> None:
        super().__init__()
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for key, tensor in self._tensors.items():
            yield _row(key, tensor.dtype, tensor.shape)

    def texts(self) -> Iterator[str]:
        """The list as json writes it with an indent of 2, row by row. Except for the name, most rows are cached."""
        encode = JSONEncoder().encode
        comma = "["
        for key, tensor in self._tensors.items():
            yield f'{comma}\n  {{\n    "name": {encode(key)},{_after_name(tensor.dtype, tensor.shape)}'
            comma = ","
        yield "[]" if comma == "[" else "\n]"


def _row(key: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": key, "dtype": dtype, "shape": list(shape), "bytes": prod(shape) * BY_CODE[dtype].size}


@lru_cache(maxsize=4096)
def _after_name(dtype: str, shape: tuple[int, ...]) -> str:
    return dumps(_row("", dtype, shape), indent=2).partition('"name": "",')[2].replace("\n", "\n  ")


def _coverage(found: Coverage) -> dict[str, float]:
    return {"tensors": found.tensors, "elements": found.elements}


def _finding(found: Finding) -> dict[str, Any]:
    return {"code": found.code, "key": found.key, "message": found.message, "level": found.level}


def error(found: CheckpointError) -> dict[str, Any]:
    """Any `CheckpointError`."""
    body = {"type": type(found).__name__, "message": found.message, "path": found.path, "key": found.key, "hint": found.hint}
    return {"version": VERSION, "error": {**body, "problems": list(found.problems)}}


def archive(found: Archive) -> dict[str, Any]:
    """`inspect`; `tensors` are those of the chosen root, or of the first."""
    from ckptsurgeon.planning.quantised import find
    from ckptsurgeon.planning.training_places import lightning_average
    from ckptsurgeon.views.selected import roots_shown, selected, tree

    shown = roots_shown(found)[0]
    chosen = selected(shown.tensors, found.look)
    averaged = lightning_average([one.root for one in found.state_dicts], found.beside)
    return {
        "version": VERSION,
        "path": found.path,
        "format": found.format,
        "fingerprint": found.fingerprint,
        "root": shown.root,
        "roots": [
            {"root": one.root, "tensors": len(one.tensors), "bytes": one.nbytes, "average": one.root == averaged}
            for one in found.state_dicts
        ],
        "tensors": Rows(chosen),
        "modules": [_module(row) for row in tree(chosen, found.look)] if found.look.depth else None,
        "quantised": [_codes(one) for one in find(shown.tensors).values()],
        "refused": {key: entry.reason for key, entry in shown.entries.items() if isinstance(entry, Refused)},
        "globals": list(found.globals),
        "metadata": dict(found.metadata),
        "provenance": None if found.provenance is None else dict(found.provenance),
        "beside": list(found.beside),
        "notes": list(found.notes),
        "part": None if found.part is None else {"kind": found.part.kind, "reason": found.part.reason, "hint": found.part.hint},
    }


def _module(row: Module) -> dict[str, Any]:
    return {"path": row.path, "level": row.level, **dict(zip(("tensors", "elements", "bytes"), row.numbers, strict=True))}


def diff(found: Diff, stat: bool = False) -> dict[str, Any]:
    """`diff`; with `stat` also how many keys of each module match."""
    prefix, command = found.prefix, found.next_command
    return {
        "version": VERSION,
        "matched": list(found.matched),
        "missing": list(found.missing),
        "extra": list(found.extra),
        "missing_shapes": {key: list(shape) for key, shape in found.missing_shapes.items()},
        "extra_shapes": {key: list(shape) for key, shape in found.extra_shapes.items()},
        "heads": [
            {
                "source": row.source,
                "target": row.target,
                "source_shape": list(row.source_shape),
                "target_shape": list(row.target_shape),
                "message": row.words,
            }
            for row in found.heads
        ],
        "mismatched": [
            {"key": row.key, "source_shape": list(row.source_shape), "target_shape": list(row.target_shape)} for row in found.mismatched
        ],
        "dtype_changed": [
            {"key": row.key, "source_dtype": row.source_dtype, "target_dtype": row.target_dtype} for row in found.dtype_changed
        ],
        "prefix": {"stripped": prefix.stripped, "added": prefix.added, "unwrapped": list(prefix.unwrapped)},
        "root": found.root,
        "coverage": _coverage(found.coverage),
        "dropped": list(found.dropped),
        "loaded": [{"key": row.key, "message": row.words} for row in found.loaded],
        "conversions": _conversions(found.conversions),
        "refused": dict(found.refused or {}),
        "adapted": [{"key": row.key, "sources": list(row.sources), "ops": [dict(op) for op in row.ops]} for row in found.adapted],
        "offers": [
            {
                "key": row.key,
                "source_shape": list(row.source_shape),
                "target_shape": list(row.target_shape),
                "adapter": row.adapter,
                "safe": row.safe,
            }
            for row in found.advice.offers
        ],
        "sizes": [_size(one) for one in found.advice.sizes],
        "quantised": [_codes(one) for one in found.quantised],
        "target_quantised": [_codes(one) for one in found.target_quantised],
        "rivals": [_way(way) for way in found.rivals],
        "exchanges": [_way(way) for way in found.exchanges],
        "hints": [{"missing": target, "extra": found.prefix.bare(source)} for target, source in found.advice.renames],
        "likely": [_link(link) for link in found.advice.links if not link.is_rename],
        "warnings": list(found.warnings),
        "next": None if command is None else _next(command, found),
        **({"stat": _stat(found)} if stat else {}),
    }


def _stat(found: Diff) -> list[dict[str, Any]]:
    from ckptsurgeon.views.counted import COUNTED, counted

    return [{"module": row.path, **dict(zip(COUNTED, row.numbers, strict=True))} for row in counted(found)]


def _next(command: Command, found: Diff) -> dict[str, Any]:
    advice = found.advice
    there = (*(row.key for row in found.mismatched), *found.missing)
    return {
        "verb": command.verb,
        "rules": _rules(rule for rule in advice.rules if rule.kind != "init"),
        "match": advice.match,
        "auto": advice.auto,
        "coverage": _coverage(advice.reaches or found.coverage),
        "open": list(advice.open if advice.reaches else there),
    }


def _conversions(found: Applied) -> dict[str, Any] | None:
    if not found.library:
        return None
    counts = {"renamed": found.renamed, "made": found.made, "left_out": found.ignored}
    return {"library": found.library, **counts, "refused": {key: words for (_, key), words in found.refused.items()}}


def _codes(found: Codes) -> dict[str, Any]:
    return {"key": found.key, "scheme": found.scheme, "scales": list(found.scales), "dequantize": found.op is not None}


def _way(way: Way) -> dict[str, Any]:
    return {"change": way.words, "tensors": len(way.mapping), "rules": _rules(way.rules)}


def _size(one: Resize) -> dict[str, Any]:
    return {"keys": [offer.key for offer in one.offers], "role": one.role, "sure": one.sure, "rules": _rules(one.rules)}


def _rules(rules: Iterable[Rule]) -> list[dict[str, str]]:
    return [{"kind": rule.kind, "pattern": rule.pattern, "result": rule.result} for rule in rules]


def _link(link: Link) -> dict[str, Any]:
    return {
        "sources": list(link.sources),
        "targets": list(link.targets),
        "op": link.op,
        "margin": None if link.margin == inf else link.margin,
        "certain": link.certain,
        "evidence": list(link.evidence),
        "runner_up": link.runner_up,
        "doubt": link.doubt,
        "choices": [str(choice) for choice in link.choices if choice.op],
    }


def _twins(found: Twins) -> dict[str, Any]:
    rows = [{"name": name, "difference": difference, "scale": scale} for name, difference, scale in found.outputs]
    return {"same": found.same, "tolerance": found.tolerance, "outputs": rows}


def matching(found: Proposal) -> dict[str, Any]:
    """`match`."""
    applied = {id(link) for link in found.applied}
    return {
        "version": VERSION,
        "source": found.source,
        "target": found.target,
        "root": found.root,
        "links": [{**_link(link), "applied": id(link) in applied} for link in found.links],
        "unmatched": list(found.unmatched),
        "unused": list(found.unused),
        "order": found.order,
        "coverage": _coverage(found.coverage),
        "used": _coverage(found.used),
        "rules": _rules(found.rules),
        "warnings": list(found.warnings),
        "conversions": found.conversions,
        "rivals": [_way(way) for way in found.rivals],
        "forward": None if found.forward is None else _twins(found.forward),
        "refused": found.refused,
    }


def _cast(cast: Cast) -> dict[str, Any]:
    return {
        "key": cast.key,
        "source_dtype": cast.source_dtype,
        "target_dtype": cast.target_dtype,
        "largest_error": cast.largest_error,
        "changed": cast.changed,
        "overflowed": cast.overflowed,
        "truncated": cast.truncated,
    }


def carried(found: CarriedState) -> dict[str, Any]:
    """The carried training state of a report."""
    return {
        "place": found.place,
        "by": found.by,
        "carried": list(found.carried),
        "adapted": list(found.adapted),
        "zeroed": list(found.zeroed),
        "not_carried": [{"name": name, "reason": reason} for name, reason in found.not_carried],
        "casts": [_cast(cast) for cast in found.casts],
        "others": list(found.others),
        "ema": None if found.ema is None else report(found.ema),
    }


def report(found: Report) -> dict[str, Any]:
    """`merge` and `apply`."""
    return {
        "version": VERSION,
        "sources": list(found.sources),
        "target": found.target,
        "output": found.output,
        "bytes": found.nbytes,
        "files": [{"name": name, "bytes": nbytes} for name, nbytes in found.files],
        "transferred": list(found.transferred),
        "adapted": list(found.adapted),
        "partial": list(found.partial),
        "kept": list(found.kept),
        "fresh": list(found.fresh),
        "still_fresh": list(found.still_fresh),
        "roots": list(found.roots),
        "prefixes": [{**_NO_PREFIX, **prefix} for prefix in found.prefixes],
        "dropped": [{"source": key, "reason": reason} for key, reason in found.dropped],
        "coverage": _coverage(found.coverage),
        "casts": [_cast(cast) for cast in found.casts],
        "findings": [_finding(finding) for finding in found.findings],
        "proven": found.proven,
        "verified": None if found.verification is None else found.verification.ok,
        "optimizer": None if found.optimizer is None else carried(found.optimizer),
    }


def verification(found: Verification) -> dict[str, Any]:
    """`verify`."""
    return {
        "version": VERSION,
        "ok": found.ok,
        "device": found.device,
        "tensors": found.tensors,
        "bitwise": found.bitwise,
        "findings": [_finding(finding) for finding in found.findings],
        "outputs": [{"name": name, "shape": list(dims)} for name, dims in found.outputs.items()],
        "fresh": None if found.fresh is None else list(found.fresh),
        "root": found.root,
        "in_place": found.in_place,
    }


def check(found: CheckReport) -> dict[str, Any]:
    """`check`."""
    files = [{"path": file.path, "ok": file.ok, "findings": [_finding(one) for one in file.findings]} for file in found.files]
    settings = found.settings
    followed = settings and {"path": settings.path, "used": dict(settings.used), "not_used": dict(settings.not_used)}
    return {"version": VERSION, "ok": found.ok, "files": files, "settings": followed}


def explain(found: Sequence[Code]) -> dict[str, Any]:
    """`check --explain`."""
    rows = [
        {"code": row.code, "name": row.name, "meaning": row.meaning, "why": row.why, "todo": row.todo, "option": row.option or None}
        for row in found
    ]
    return {"version": VERSION, "codes": rows}


def groups(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`groups`."""
    return {"version": VERSION, "groups": rows}


def known(rows: Sequence[tuple[str, str, tuple[str, ...], str]]) -> dict[str, Any]:
    """`adapters`."""
    found = [{"kind": kind, "name": name, "arguments": list(arguments), "words": words} for kind, name, arguments, words in rows]
    return {"version": VERSION, "known": found}
