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
    from ckptsurgeon.planning.prefixes.rivals import NameChange
    from ckptsurgeon.planning.quantised_weights.find import Codes
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


def _coverage(coverage: Coverage) -> dict[str, float]:
    return {"tensors": coverage.tensors, "elements": coverage.elements}


def _finding(finding: Finding) -> dict[str, Any]:
    return {"code": finding.code, "key": finding.key, "message": finding.message, "level": finding.level}


def error(error: CheckpointError) -> dict[str, Any]:
    """Any `CheckpointError`."""
    body = {"type": type(error).__name__, "message": error.message, "path": error.path, "key": error.key, "hint": error.hint}
    return {"version": VERSION, "error": {**body, "problems": list(error.problems)}}


def archive(archive: Archive) -> dict[str, Any]:
    """`inspect`; `tensors` are those of the chosen root, or of the first."""
    from ckptsurgeon.planning.quantised_weights.find import find
    from ckptsurgeon.planning.training_places import lightning_average
    from ckptsurgeon.views.selected import roots_shown, selected, tree

    shown = roots_shown(archive)[0]
    chosen = selected(shown.tensors, archive.look)
    averaged = lightning_average([one.root for one in archive.state_dicts], archive.beside)
    return {
        "version": VERSION,
        "path": archive.path,
        "format": archive.format,
        "fingerprint": archive.fingerprint,
        "root": shown.root,
        "roots": [
            {"root": one.root, "tensors": len(one.tensors), "bytes": one.nbytes, "average": one.root == averaged}
            for one in archive.state_dicts
        ],
        "tensors": Rows(chosen),
        "modules": [_module(row) for row in tree(chosen, archive.look)] if archive.look.depth else None,
        "quantised": [_codes(one) for one in find(shown.tensors).values()],
        "refused": {key: entry.reason for key, entry in shown.entries.items() if isinstance(entry, Refused)},
        "globals": list(archive.globals),
        "metadata": dict(archive.metadata),
        "provenance": None if archive.provenance is None else dict(archive.provenance),
        "beside": list(archive.beside),
        "notes": list(archive.notes),
        "part": None if archive.part is None else {"kind": archive.part.kind, "reason": archive.part.reason, "hint": archive.part.hint},
    }


def _module(row: Module) -> dict[str, Any]:
    return {"path": row.path, "level": row.level, **dict(zip(("tensors", "elements", "bytes"), row.numbers, strict=True))}


def diff(diff: Diff, stat: bool = False) -> dict[str, Any]:
    """`diff`; with `stat` also how many keys of each module match."""
    prefix, command = diff.prefix, diff.next_command
    return {
        "version": VERSION,
        "matched": list(diff.matched),
        "missing": list(diff.missing),
        "extra": list(diff.extra),
        "missing_shapes": {key: list(shape) for key, shape in diff.missing_shapes.items()},
        "extra_shapes": {key: list(shape) for key, shape in diff.extra_shapes.items()},
        "heads": [
            {
                "source": row.source,
                "target": row.target,
                "source_shape": list(row.source_shape),
                "target_shape": list(row.target_shape),
                "message": row.words,
            }
            for row in diff.heads
        ],
        "mismatched": [
            {"key": row.key, "source_shape": list(row.source_shape), "target_shape": list(row.target_shape)} for row in diff.mismatched
        ],
        "dtype_changed": [
            {"key": row.key, "source_dtype": row.source_dtype, "target_dtype": row.target_dtype} for row in diff.dtype_changed
        ],
        "prefix": {"stripped": prefix.stripped, "added": prefix.added, "unwrapped": list(prefix.unwrapped)},
        "root": diff.root,
        "coverage": _coverage(diff.coverage),
        "dropped": list(diff.dropped),
        "loaded": [{"key": row.key, "message": row.words} for row in diff.loaded],
        "conversions": _conversions(diff.conversions),
        "refused": dict(diff.refused or {}),
        "adapted": [{"key": row.key, "sources": list(row.sources), "ops": [dict(op) for op in row.ops]} for row in diff.adapted],
        "offers": [
            {
                "key": row.key,
                "source_shape": list(row.source_shape),
                "target_shape": list(row.target_shape),
                "adapter": row.adapter,
                "safe": row.safe,
            }
            for row in diff.advice.offers
        ],
        "sizes": [_size(one) for one in diff.advice.sizes],
        "quantised": [_codes(one) for one in diff.quantised],
        "target_quantised": [_codes(one) for one in diff.target_quantised],
        "rivals": [_way(way) for way in diff.rivals],
        "exchanges": [_way(way) for way in diff.exchanges],
        "hints": [{"missing": target, "extra": diff.prefix.bare(source)} for target, source in diff.advice.renames],
        "likely": [_link(link) for link in diff.advice.links if not link.is_rename],
        "warnings": list(diff.warnings),
        "next": None if command is None else _next(command, diff),
        **({"stat": _stat(diff)} if stat else {}),
    }


def _stat(diff: Diff) -> list[dict[str, Any]]:
    from ckptsurgeon.views.counted import COUNTED, counted

    return [{"module": row.path, **dict(zip(COUNTED, row.numbers, strict=True))} for row in counted(diff)]


def _next(command: Command, diff: Diff) -> dict[str, Any]:
    advice = diff.advice
    there = (*(row.key for row in diff.mismatched), *diff.missing)
    return {
        "verb": command.verb,
        "rules": _rules(rule for rule in advice.rules if rule.kind != "init"),
        "match": advice.match,
        "auto": advice.auto,
        "coverage": _coverage(advice.reaches or diff.coverage),
        "open": list(advice.open if advice.reaches else there),
    }


def _conversions(conversions: Applied) -> dict[str, Any] | None:
    if not conversions.library:
        return None
    counts = {"renamed": conversions.renamed, "made": conversions.made, "left_out": conversions.ignored}
    return {"library": conversions.library, **counts, "refused": {key: words for (_, key), words in conversions.refused.items()}}


def _codes(codes: Codes) -> dict[str, Any]:
    return {"key": codes.key, "scheme": codes.scheme, "scales": list(codes.scales), "dequantize": codes.op is not None}


def _way(way: NameChange) -> dict[str, Any]:
    return {"change": way.words, "tensors": len(way.mapping), "rules": _rules(way.rules)}


def _size(resize: Resize) -> dict[str, Any]:
    return {"keys": [offer.key for offer in resize.offers], "role": resize.role, "sure": resize.sure, "rules": _rules(resize.rules)}


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


def _twins(comparison: Twins) -> dict[str, Any]:
    rows = [{"name": name, "difference": difference, "scale": scale} for name, difference, scale in comparison.outputs]
    return {"same": comparison.same, "tolerance": comparison.tolerance, "outputs": rows}


def matching(proposal: Proposal) -> dict[str, Any]:
    """`match`."""
    applied = {id(link) for link in proposal.applied}
    return {
        "version": VERSION,
        "source": proposal.source,
        "target": proposal.target,
        "root": proposal.root,
        "links": [{**_link(link), "applied": id(link) in applied} for link in proposal.links],
        "unmatched": list(proposal.unmatched),
        "unused": list(proposal.unused),
        "order": proposal.order,
        "coverage": _coverage(proposal.coverage),
        "used": _coverage(proposal.used),
        "rules": _rules(proposal.rules),
        "warnings": list(proposal.warnings),
        "conversions": proposal.conversions,
        "rivals": [_way(way) for way in proposal.rivals],
        "forward": None if proposal.forward is None else _twins(proposal.forward),
        "refused": proposal.refused,
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


def carried(state: CarriedState) -> dict[str, Any]:
    """The carried training state of a report."""
    return {
        "place": state.place,
        "by": state.by,
        "carried": list(state.carried),
        "adapted": list(state.adapted),
        "zeroed": list(state.zeroed),
        "not_carried": [{"name": name, "reason": reason} for name, reason in state.not_carried],
        "casts": [_cast(cast) for cast in state.casts],
        "others": list(state.others),
        "ema": None if state.ema is None else report(state.ema),
    }


def report(report: Report) -> dict[str, Any]:
    """`merge` and `apply`."""
    return {
        "version": VERSION,
        "sources": list(report.sources),
        "target": report.target,
        "output": report.output,
        "bytes": report.nbytes,
        "files": [{"name": name, "bytes": nbytes} for name, nbytes in report.files],
        "shared": report.shared,
        "copied": report.copied,
        "transferred": list(report.transferred),
        "adapted": list(report.adapted),
        "partial": list(report.partial),
        "kept": list(report.kept),
        "fresh": list(report.fresh),
        "still_fresh": list(report.still_fresh),
        "roots": list(report.roots),
        "prefixes": [{**_NO_PREFIX, **prefix} for prefix in report.prefixes],
        "dropped": [{"source": key, "reason": reason} for key, reason in report.dropped],
        "left_behind": list(report.left_behind),
        "coverage": _coverage(report.coverage),
        "casts": [_cast(cast) for cast in report.casts],
        "findings": [_finding(finding) for finding in report.findings],
        "proven": report.proven,
        "proof": report.proof,
        "verified": None if report.verification is None else report.verification.ok,
        "optimizer": None if report.optimizer is None else carried(report.optimizer),
    }


def verification(verification: Verification) -> dict[str, Any]:
    """`verify`."""
    return {
        "version": VERSION,
        "ok": verification.ok,
        "device": verification.device,
        "tensors": verification.tensors,
        "bitwise": verification.bitwise,
        "findings": [_finding(finding) for finding in verification.findings],
        "outputs": [{"name": name, "shape": list(dims)} for name, dims in verification.outputs.items()],
        "fresh": None if verification.fresh is None else list(verification.fresh),
        "root": verification.root,
        "in_place": verification.in_place,
    }


def check(report: CheckReport) -> dict[str, Any]:
    """`check`."""
    files = [{"path": file.path, "ok": file.ok, "findings": [_finding(one) for one in file.findings]} for file in report.files]
    settings = report.settings
    followed = settings and {"path": settings.path, "used": dict(settings.used), "not_used": dict(settings.not_used)}
    return {"version": VERSION, "ok": report.ok, "files": files, "settings": followed}


def explain(codes: Sequence[Code]) -> dict[str, Any]:
    """`check --explain`."""
    rows = [
        {"code": row.code, "name": row.name, "meaning": row.meaning, "why": row.why, "todo": row.todo, "option": row.option or None}
        for row in codes
    ]
    return {"version": VERSION, "codes": rows}


def groups(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`groups`."""
    return {"version": VERSION, "groups": rows}


def known(rows: Sequence[tuple[str, str, tuple[str, ...], str]]) -> dict[str, Any]:
    """`adapters`."""
    entries = [{"kind": kind, "name": name, "arguments": list(arguments), "words": words} for kind, name, arguments, words in rows]
    return {"version": VERSION, "known": entries}
