"""Checks that the data of a plan's files has not changed since the plan was made, by a sample or a digest; and reads plan files.

Headers are compared before, by their fingerprints.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ckptsurgeon.errors import CheckpointError, PlanError, StaleError
from ckptsurgeon.models.target.spec import looks_like_spec
from ckptsurgeon.parameter_types import Path
from ckptsurgeon.planning import planfile
from ckptsurgeon.planning.plan import Plan, PlanSource, PlanTarget
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.streaming.sampling import digest, sample
from ckptsurgeon.tensors import Checkpoint


def sampled(plan: Plan, sources: Sequence[Checkpoint], target: Checkpoint | None, full: bool) -> Plan:
    """The plan with a sample of its files' data, and with `full` a digest of all data."""

    def all_of(checkpoint: Checkpoint) -> str:
        return digest(checkpoint) if full else ""

    rows = [replace(row, sample=sample(source), sha256=all_of(source)) for row, source in zip(plan.sources, sources, strict=True)]
    planned_target = plan.target
    if planned_target is not None and target is not None:
        planned_target = replace(planned_target, sample=sample(target), sha256=all_of(target))
    return replace(plan, sources=tuple(rows), target=planned_target)


def check_data(plan: Plan, sources: Sequence[Checkpoint], target: Checkpoint | None) -> None:
    """Raises StaleError when the data of a source or the target has changed since the plan was made. Headers were compared before."""
    rows: list[tuple[PlanSource | PlanTarget, Checkpoint]] = [*zip(plan.sources, sources, strict=True)]
    if plan.target is not None and target is not None:
        rows.append((plan.target, target))
    for planned, checkpoint in rows:
        for recorded, compute in ((planned.sha256, digest), (planned.sample, sample)):
            if recorded and recorded != compute(checkpoint):
                raise StaleError("was saved anew with other values since the plan was made", path=checkpoint.path, hint="plan again")
            if recorded:
                break  # a digest of all data makes the sample redundant


@contextmanager
def hinting(plan: Plan, path: str | None) -> Iterator[None]:
    """A context that adds to a StaleError the command that makes the plan at `path` again."""
    try:
        yield
    except StaleError as error:
        live = plan.target is not None and plan.target.kind == "model" and not looks_like_spec(plan.target.spec)
        if path is not None and not live:
            error.hint = f"plan again, with the rules and other options that it had, if any: {shlex.join(_command(plan, path))}"
        raise


def _command(plan: Plan, path: str) -> Iterator[str]:
    """The words of a command that makes a plan again, without its rules."""
    yield from ("ckptsurgeon", "plan", *(source.path for source in plan.sources))
    if plan.target is not None:
        yield plan.target.spec
    elif len(plan.sources) > 1:
        yield "--average"
    roots = {source.root for source in plan.sources}
    if len(roots) == 1 and "" not in roots:
        yield from ("--root", *roots)
    if plan.seed:
        yield from ("--seed", str(plan.seed))
    for pattern in plan.allow_cast:
        yield from ("--allow-cast", pattern)
    if any(row.sha256 for row in plan.sources):
        yield "--full"
    yield from ("-o", path, "--overwrite")


def load_plan(path: Path) -> Plan:
    """The plan in a plan.json.

    Args:
        path: a plan.json.

    Returns:
        The `Plan`.

    Raises:
        PlanError: it is no plan, has another version, or is damaged.

    >>> import json
    >>> from pathlib import Path
    >>> from ckptsurgeon import plan
    >>> decided = plan("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses")
    >>> _ = Path("plan.json").write_text(json.dumps(planfile.to_json(decided)))
    >>> load_plan("plan.json").fresh
    ('fc3.weight', 'fc3.bias')
    """
    from ckptsurgeon.limit_table import allowed, exceeded
    from ckptsurgeon.storage.opening import open_regular

    with open_regular(os.fspath(path)) as file:
        _refuse_checkpoint(file)
        if file.size > (most := allowed("json-bytes")):
            raise exceeded("json-bytes", f"is a file of {file.size:,} bytes, above the limit of {most:,}", file.size, path=os.fspath(path))
        return planfile.from_json(file.read(0, file.size), os.fspath(path))


def _refuse_checkpoint(file: OpenFile) -> None:
    """Raises PlanError for a file that begins as a checkpoint or rules file; JSON is parsed later."""
    from ckptsurgeon.formats.sniff import format_of, is_rules

    head = file.read(0, min(file.size, 4096))
    if head.lstrip()[:1] == b"{":
        return
    if is_rules(head):
        raise PlanError("is a rules file, not a plan", path=file.path, hint=f"plan or merge with it: rules={file.path!r}")
    try:
        file_format = format_of(file)
    except CheckpointError:
        return
    from ckptsurgeon.models.target.slips import only_model

    target = only_model()
    words = shlex.join(["ckptsurgeon", "plan", file.path, target, "-o", "plan.json"]) if target else "ckptsurgeon help plan"
    raise PlanError(f"is a checkpoint ({file_format.name}), not a plan", path=file.path, hint=f"plan it first: {words}")
