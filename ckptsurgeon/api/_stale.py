"""Whether the data that a plan was made for is still what it was, by a sample of it or as a whole; and plans that lie in files.

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


def sampled(made: Plan, sources: Sequence[Checkpoint], target: Checkpoint | None, full: bool) -> Plan:
    """A plan that knows of the data it was made for: by a sample, and with `full` by a digest of all."""

    def all_of(checkpoint: Checkpoint) -> str:
        return digest(checkpoint) if full else ""

    rows = [replace(row, sample=sample(found), sha256=all_of(found)) for row, found in zip(made.sources, sources, strict=True)]
    goal = made.target
    if goal is not None and target is not None:
        goal = replace(goal, sample=sample(target), sha256=all_of(target))
    return replace(made, sources=tuple(rows), target=goal)


def check_data(made: Plan, sources: Sequence[Checkpoint], target: Checkpoint | None) -> None:
    """Raises StaleError when a source or the target has other data than the plan was made for; their headers are known to be the same."""
    held: list[tuple[PlanSource | PlanTarget, Checkpoint]] = [*zip(made.sources, sources, strict=True)]
    if made.target is not None and target is not None:
        held.append((made.target, target))
    for planned, found in held:
        for known, take in ((planned.sha256, digest), (planned.sample, sample)):
            if known and known != take(found):
                raise StaleError("was saved anew with other values since the plan was made", path=found.path, hint="plan again")
            if known:
                break  # what is known of all needs no sample


@contextmanager
def hinting(made: Plan, path: str | None) -> Iterator[None]:
    """Within it, a StaleError says how to plan again: for a plan in a file by the command that makes it anew."""
    try:
        yield
    except StaleError as error:
        live = made.target is not None and made.target.kind == "model" and not looks_like_spec(made.target.spec)
        if path is not None and not live:
            error.hint = f"plan again, with the rules and other options that it had, if any: {shlex.join(_command(made, path))}"
        raise


def _command(made: Plan, path: str) -> Iterator[str]:
    """The words of a command that makes a plan again, its rules left out."""
    yield from ("ckptsurgeon", "plan", *(source.path for source in made.sources))
    if made.target is not None:
        yield made.target.spec
    elif len(made.sources) > 1:
        yield "--average"
    roots = {source.root for source in made.sources}
    if len(roots) == 1 and "" not in roots:
        yield from ("--root", *roots)
    if made.seed:
        yield from ("--seed", str(made.seed))
    for pattern in made.allow_cast:
        yield from ("--allow-cast", pattern)
    if any(row.sha256 for row in made.sources):
        yield "--full"
    yield from ("-o", path, "--overwrite")


def load_plan(path: Path) -> Plan:
    """The plan in a plan.json.

    Args:
        path: a plan.json.

    Returns:
        The `Plan`.

    Raises:
        PlanError: it is none, of another version, or damaged.

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
    """PlanError for a file that begins as a checkpoint; JSON is looked into later."""
    from ckptsurgeon.formats.sniff import format_of, is_rules

    head = file.read(0, min(file.size, 4096))
    if head.lstrip()[:1] == b"{":
        return
    if is_rules(head):
        raise PlanError("is a rules file, not a plan", path=file.path, hint=f"plan or merge with it: rules={file.path!r}")
    try:
        form = format_of(file)
    except CheckpointError:
        return
    from ckptsurgeon.models.target.slips import only_model

    target = only_model()
    words = shlex.join(["ckptsurgeon", "plan", file.path, target, "-o", "plan.json"]) if target else "ckptsurgeon help plan"
    raise PlanError(f"is a checkpoint ({form.name}), not a plan", path=file.path, hint=f"plan it first: {words}")
