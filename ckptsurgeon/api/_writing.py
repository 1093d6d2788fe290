"""Carries out a plan: writes the file with the record of what it is made of, verifies it, and returns the report. `merge` and `apply` share
it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptsurgeon import __version__
from ckptsurgeon.api._deciding import report_of
from ckptsurgeon.api._opening import Target
from ckptsurgeon.api._options import NO_TRAINING, OutputOptions, TrainingOptions, facts, refuse_idle
from ckptsurgeon.api._proving import refuse_non_finite, verify_written
from ckptsurgeon.api._rules import Own
from ckptsurgeon.errors import ModelError, OutputError, PlanError, no_memory, out_of_memory
from ckptsurgeon.formats.registry import OUTPUTS, SUFFIXES, WRITTEN
from ckptsurgeon.parameter_types import Path
from ckptsurgeon.planning.plan import Plan, digest
from ckptsurgeon.report import Report, Verification
from ckptsurgeon.streaming.apply import Output, Save, Training
from ckptsurgeon.streaming.apply import apply as write_plan
from ckptsurgeon.streaming.atomic import check_free, named, refuse_no_file
from ckptsurgeon.streaming.step_values import Values
from ckptsurgeon.streaming.values import Buffer
from ckptsurgeon.tensors import Checkpoint

# Suffixes of formats that are not written: no hint offers to write another format under such a name.
_NEVER_WRITTEN = frozenset({*SUFFIXES, ".npz", ".npy", ".json", ".h5", ".hdf5", ".gguf", ".onnx", ".zip", ".tar", ".gz"}) - {*OUTPUTS}


def output_format(output: Path, format: str | None = None) -> str:
    """The format to write, as `format` or the output's suffix says.

    Args:
        output: the file to write; its suffix says the format (`.pt .pth .pkl .bin .ckpt` for torch's zip, `.safetensors`). A folder, or a
            path that ends in a slash, gets shards in Hugging Face's names, of safetensors where no format is named.
        format: `"torch"` or `"safetensors"`, whatever the suffix of `output`; `"dcp"` writes a folder of torch.distributed.checkpoint.

    Returns:
        `"torch"`, `"safetensors"` or `"dcp"`.

    Raises:
        OutputError: the suffix, or `format`, names neither.

    >>> output_format("net.pt"), output_format("net.ckpt", "safetensors"), output_format("net/")
    ('torch', 'safetensors', 'safetensors')
    """
    if format is not None:
        if format not in WRITTEN:
            raise OutputError(f"{format!r} is no format to write", path=output, hint=" or ".join(WRITTEN))
        return format
    if _is_folder(os.fspath(output)):
        return "safetensors"
    suffix = os.path.splitext(os.fspath(output))[1].lower()
    if suffix not in OUTPUTS:
        refuse_no_file(os.fspath(output))
        python_hint = "" if suffix in _NEVER_WRITTEN else ", or give format='torch'"
        raise OutputError(
            f"its suffix {suffix!r} does not say which format to write",
            path=output,
            hint=f"end it in one of {' '.join(OUTPUTS)}{python_hint}",
        )
    return OUTPUTS[suffix]


@dataclass(frozen=True)
class OutputKind:
    """The format of an output, whether it is a folder, and the most bytes of a shard if shards are written."""

    format: str
    is_folder: bool = False
    max_shard_size: int | None = None


def output_kind(options: OutputOptions, planned: int | None = None) -> OutputKind:
    """What is written: one file, a folder of shards, or a folder in a library's own format (DCP).

    A folder is written if the path ends in a slash or is a folder already, if a shard size is given here or in the plan, and for a format
    that is always a folder.

    Args:
        planned: the shard size that the plan records.

    Raises:
        OutputError: as `output_format`; or a folder would be written, and the path names a file.
    """
    path = os.fspath(options.output)
    size = options.shard_size or planned
    by_library = (
        options.format is not None and output_format(path, options.format) == options.format and bool(WRITTEN[options.format].saved)
    )
    if not _is_folder(path) and size is None and not by_library:
        return OutputKind(output_format(path, options.format))
    if not _is_folder(path) and (os.path.splitext(path)[1].lower() in OUTPUTS or os.path.isfile(path)):
        words = f"names a file, and {f'format={options.format!r}' if by_library else 'max_shard_size'} writes a folder"
        raise OutputError(words, path=path, hint=f"-o {shlex.quote(os.path.splitext(path)[0] + '/')}")
    if by_library:
        return OutputKind(output_format(path, options.format), True)
    from ckptsurgeon.formats.folders.shards import USUAL_SIZE

    return OutputKind(output_format(path, options.format or "safetensors"), True, size or USUAL_SIZE)


def _is_folder(path: str) -> bool:
    """Whether a path ends in a slash or is a folder."""
    return bool(path) and (path.endswith(("/", os.sep)) or os.path.isdir(path))


def refuse_output(options: OutputOptions, planned: int | None = None) -> None:
    """Raises OutputError for a path that implies no format, or that exists and may not be replaced."""
    if not output_kind(options, planned).is_folder:
        check_free(os.fspath(options.output), options.overwrite)
    else:
        from ckptsurgeon.streaming.new_folder import check_folder

        check_folder(os.fspath(options.output), options.overwrite, options.resume)


def refuse_idle_writing(plan: Plan, options: OutputOptions, training: TrainingOptions = NO_TRAINING, *, written: bool = True) -> None:
    """Raises SettingsError for an option about the output that would do nothing; `written` is False for a dry run."""
    kind = output_kind(options, plan.max_shard_size)
    known_facts = facts(
        model=plan.target is not None and plan.target.kind == "model",
        verify=options.verify,
        leaves_out_tied=WRITTEN[kind.format].leaves_out_tied,
        our_writer=not WRITTEN[kind.format].saved,
        by_torch=bool(WRITTEN[kind.format].saved),
        shards=kind.max_shard_size,
        one_file=not kind.is_folder,
        optimizer=training.written,
        written=written,
    )
    refuse_idle(known_facts, **vars(options), **vars(training))


def carry_out(
    plan: Plan, sources: Sequence[Checkpoint], target: Target | None, options: OutputOptions, own: Own, around: Training | None = None
) -> Report:
    """Carry out a plan: write the file, verify it before it gets its name, and return the report.

    Args:
        own: the user code that the plan names.
        around: the training checkpoint to write around the weights; None for the weights alone.

    Raises:
        CheckpointError: as `ckptsurgeon.merge`.
    """
    target_checkpoint, finite = None if target is None else target.checkpoint, options.finite
    provenance = _record(plan) if options.provenance else None
    kind = output_kind(options, plan.max_shard_size)
    output = Output(
        path=os.fspath(options.output),
        format=kind.format,
        overwrite=options.overwrite,
        tied=options.tied or "copy",
        provenance=provenance,
        proof=options.proof or "full",
        max_shard_size=kind.max_shard_size,
        resume=options.resume,
    )
    if output.tied not in ("copy", "alias"):
        raise OutputError(f"{output.tied!r} is no option for tied keys", path=output.path, hint="copy or alias")
    verification: list[Verification] = []

    def prove(path: str) -> None:
        if output.proven and target is not None and target.build is not None:
            device = options.device or ("cpu" if output.proof == "full" else "meta")  # where no values are read
            verified = verify_written(path, target, device, finite=finite, seed=plan.seed, shown=output.path)
            findings = tuple(replace(row, message=named(row.message, path, output.path)) for row in verified.findings)
            verification.append(replace(verified, findings=findings))
        if finite and (not verification or around is not None):  # the model has checked the weights alone
            refuse_non_finite(path, output.path)

    values = _values(plan, target, own, output.format)
    written = write_plan(plan, sources, target_checkpoint, output, values=values, verify=prove, training=around, save=_saving(output))
    checked = verification[0] if verification else None
    return report_of(
        plan,
        casts=written.casts,
        findings=(*written.findings, *(checked.findings if checked is not None else ())),
        output=output.path,
        nbytes=sum(size for _, size in written.files),
        files=written.files,
        shared=written.shared,
        copied=written.copied,
        proof=output.proof,
        verification=checked,
    )


def _saving(output: Output) -> Save | None:
    """The function by which a format's own library writes the file; None where ckptsurgeon writes it."""
    if not output.form.saved:
        return None
    from ckptsurgeon.models.sharded.save import save

    return save


def _values(plan: Plan, target: Target | None, own: Own, format: str) -> Values | None:
    schemes = {step.target: scheme for step in plan.steps for scheme in step.schemes}
    loaded = _loaded_values(plan, target, format)
    if target is None or not (schemes or plan.needs_model):
        return Values(_no_initial, _no_initial, own.kernels, loaded) if own.kernels or loaded else None
    from ckptsurgeon.models.init.values import extra_state, make_provider

    model = target.build(plan.seed) if target.build is not None and plan.needs_model else None
    provide = make_provider(model, schemes, target.checkpoint, plan.seed, own.schemes)
    extra = extra_state(model) if model is not None else {}
    leaders = {key: group[0] for group in plan.ties for key in group}

    def initial(key: str) -> Buffer:
        try:
            return provide(leaders.get(key, key))  # tied keys are one tensor, with one value
        except (MemoryError, RuntimeError) as error:
            if no_memory(error):
                raise out_of_memory(error, key) from error
            raise

    def own_extra(key: str) -> Any:
        if key not in extra:
            raise ModelError(
                "is an extra state, and there is no model to take it from", key=key, hint="give the model itself as the target"
            )
        return extra[key]

    return Values(initial, own_extra, own.kernels, loaded)


def _loaded_values(plan: Plan, target: Target | None, format: str) -> Any:
    """A function that returns the values that the model's loading code computes; None where it computes none."""
    if target is None or target.build is None or not (target.checkpoint.loaders or target.checkpoint.overlaps):
        return None
    from ckptsurgeon.models.own_loading.loaded_values import is_needed, loaded_values

    build, checkpoint, versionless = target.build, target.checkpoint, not WRITTEN[format].keeps_versions
    if not is_needed(plan, checkpoint, versionless):
        return None
    return lambda fetch, extra: loaded_values(plan, checkpoint, build, fetch, extra, versionless)


def _no_initial(key: str) -> Any:
    raise PlanError("gets the target's own value, and there is no target with values", key=key)


def _record(plan: Plan) -> dict[str, Any]:
    """What a merge writes about itself into its output: no path and no time, so that the same input gives the same bytes."""
    return {
        "version": 1,
        "tool": f"ckptsurgeon {__version__}",
        "plan": digest(plan),
        "sources": [{"fingerprint": source.fingerprint, "format": source.format, "root": source.root} for source in plan.sources],
        "target": None if plan.target is None else {"fingerprint": plan.target.fingerprint, "kind": plan.target.kind},
        "seed": plan.seed,
        "coverage": {"tensors": plan.coverage.tensors, "elements": plan.coverage.elements},
        "fresh": list(plan.fresh),
        "kept": list(plan.kept),
        "partial": list(plan.partial),
    }
