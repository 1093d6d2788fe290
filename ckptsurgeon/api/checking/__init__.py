"""The gate: are files readable, safe, whole, and do they fit? Every finding of every file at once, in the order of the paths.

`settings` has the options of a check, `one` checks a file, `folders` lists the files of a folder, `workers` checks several at a time,
`project` reads the settings in a pyproject.toml.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import Target, silent
from ckptsurgeon.api.checking import folders, one, workers
from ckptsurgeon.api.checking.settings import Gate, gate, refuse_unheard
from ckptsurgeon.errors import SettingsError
from ckptsurgeon.parameter_types import Dtype, Given, Note, OnProgress, Path, Words
from ckptsurgeon.report import CheckReport, FileCheck, Settings

__all__ = ["check", "check_each", "target_of"]

_LARGE = 16 << 20  # bytes of all files together, beyond which headers may take long to read


def check(
    paths: Path | Iterable[Path],
    *,
    against: Given | None = None,
    finite: bool = False,
    full: bool = False,
    max_size: int | str | None = None,
    dtypes: Dtype | Iterable[Dtype] = (),
    allow: Words = (),
    select: Words = (),
    ignore: Words = (),
    root: str | None = None,
    conversions: bool = True,
    jobs: int | None = None,
    note: Note = silent,
    progress: OnProgress | None = None,
) -> CheckReport:
    """Whether files are readable, safe, whole, and what is expected; every finding of every file at once, in the order of the paths.

    A Hugging Face folder is one checkpoint; any other folder stands for those in it and below. No pyproject.toml is read.

    Args:
        paths: a path or several; a Hugging Face folder is one checkpoint, any other folder stands for the files in it and below.
        against: what each must fit: a model, a spec such as `"model:Net"`, a skeleton or a checkpoint.
        finite: NaN and infinite values are errors; needs torch.
        full: compare the data with the checksums of torch's zip format.
        max_size: the most bytes, as a number or as text such as `"500MB"` (10⁶) or `"1.5GB"` (10⁹).
        dtypes: the expected ones, by any of their names (`F16`, `float16`, `torch.half`). Floating and complex tensors of others are found;
            integers and booleans only where one of their kind is expected.
        allow: the formats that may be, such as `safetensors` or `torch` (or only `torch-zip`); the error for another word lists all.
        select: report only these codes, or beginnings of codes such as `"CK2"`; a file that can't be read is reported in any case.
        ignore: codes not to report; stronger than `select`.
        root: the nested dict that holds the state_dict; by default each one is checked, or the one that fits `against`.
        conversions: `False` takes names as they are where the target is a model of transformers, whose own loading renames keys, and cuts,
            joins or turns tensors.
        jobs: how many files at a time; by default as many as there are cores, at most 8.
        note: called with each note, a line of text; notes are dropped by default.
        progress: called with a `Progress`, how far the work is, at most ten times a second; what it raises stops the run, and nothing is
            left half done.

    Returns:
        A `CheckReport`: `ok`, and the findings of each of its `files`.

    Raises:
        SettingsError: a size, dtype, format or code that there is not.
        CheckpointError: `against` can't be read or built. A bad file is a finding, not an error.

    >>> check("fixtures/net_params.pkl").ok
    True
    >>> [(found.code, found.key) for found in check("fixtures/net_params.pkl", dtypes="float16").files[0].findings][:1]
    [('CK503', 'conv1.weight')]
    """
    words: dict[str, Any] = {
        "finite": finite,
        "full": full,
        "max_size": max_size,
        "dtypes": dtypes,
        "allow": allow,
        "select": select,
        "ignore": ignore,
    }
    refuse_unheard({**words, "against": against is not None})
    options = gate(root=root, **words)  # an invalid option is an error before a model is built
    if against is not None:
        words["against"] = target_of(against, note)
    if against is not None or not conversions:
        options = gate(root=root, conversions=conversions, **words)
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not files:
        raise SettingsError("no path is given, and nothing that was not looked at is good", key="paths", hint="check(['net.pt'])")
    return check_each([os.fspath(path) for path in files], lambda _path: options, jobs=jobs, note=note)


def target_of(against: Given, note: Note) -> Target:
    """The target that files must fit, opened."""
    return _opening.open_target(against, note=note)


def check_each(
    paths: Iterable[str], choose: Callable[[str], Gate], *, jobs: int | None = None, settings: Settings | None = None, note: Note = silent
) -> CheckReport:
    """As `check`, with a gate for each file, which `choose` returns; `settings` are those of a settings file, for the report."""
    if jobs is not None and jobs < 1:
        raise SettingsError(f"{jobs} is no number of jobs", key="--jobs", hint="1 or more")
    files = [file for path in paths for file in folders.expand(path)]
    gates = [choose(file) for file in files]
    for words in dict.fromkeys(words for file_gate in gates for words in file_gate.notes):
        note(words)

    def work(number: int, alive: one.Alive) -> workers.Findings:
        return one.findings(files[number], gates[number], alive)

    findings = workers.in_order(
        work,
        len(files),
        jobs or workers.default_jobs(),
        values=any(file_gate.finite and file_gate.wants("CK401") for file_gate in gates),
        large=any(file_gate.full for file_gate in gates) or sum(map(folders.size, files)) > _LARGE,
    )
    return CheckReport(tuple(FileCheck(file, file_findings) for file, file_findings in zip(files, findings, strict=True)), settings)
