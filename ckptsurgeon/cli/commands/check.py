"""`check`: the gate for pre-commit and CI, and what its codes mean."""

from __future__ import annotations

import os
from typing import Any

import click

from ckptsurgeon.cli import options


@click.command("check", cls=options.Command)
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--against", metavar="TARGET", help="What every file must fit: a skeleton (no torch needed), a model, a checkpoint.")
@click.option("--finite/--no-finite", help="Report NaN and infinite values (needs torch).")
@click.option("--full/--no-full", help="Compare the data with the checksums of torch's zip format; reads whole files.")
@click.option("--max-size", metavar="SIZE", help="The largest size of a checkpoint: 500MB, 1.5GB.")
@click.option(
    "--dtype", "dtypes", multiple=True, metavar="DTYPE,...", help="The dtypes that floating tensors may have: F16,BF16 or float16,bfloat16."
)
@click.option("--allow", multiple=True, metavar="FORMAT,...", help="The formats that are allowed: safetensors,torch-zip.")
@click.option(
    "--select",
    multiple=True,
    metavar="CODE,...",
    help="Report only these codes, or families such as CK2 (what can't be read is always reported).",
)
@click.option("--ignore", multiple=True, metavar="CODE,...", help="Do not report these codes.")
@options.root
@options.conversions
@options.limit
@click.option(
    "--jobs",
    type=options.Integer(min=1),
    metavar="N",
    help="How many files are checked at a time; if not given, one for each core, at most 8.",
)
@click.option("--config", metavar="FILE", help="Take the settings from this file instead of the nearest pyproject.toml.")
@click.option("--no-config", is_flag=True, help="Take no settings from any file.")
@click.option("--github", is_flag=True, help="Answer as annotations of GitHub Actions.")
@click.option("--explain", metavar="CODE", help="Print what a code means, why it matters and what to do; checks nothing.")
@options.tabled
@click.pass_context
def command(ctx: click.Context, /, paths: tuple[str, ...], show: options.Show, **words: Any) -> int:
    """Are the files readable, safe, whole, and do they fit? Exit 1 when anything is found.

    A Hugging Face folder is one checkpoint; of any other folder every .pt, .pth, .pkl, .bin, .ckpt and .safetensors file is checked, in it
    and below (names that begin with a dot aside).

    Settings are read from [tool.ckptsurgeon.check] of the nearest pyproject.toml, by the options' names; options given here override them.
    """
    github, explain, file, no_config = (words.pop(name) for name in ("github", "explain", "config", "no_config"))
    if github and show.json:
        raise click.UsageError("--github and --json are two forms of output; give one", ctx)
    given_names = [name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if explain is not None:
        idle = [name for name in given_names if name not in ("explain", "as_json", "verbose", "quiet")]
        if idle:
            raise click.UsageError(f"--explain checks nothing; give it alone: --explain {explain}", ctx)
        return _explain(explain, show)
    if not paths:
        raise click.UsageError("Missing argument 'PATH...'.", ctx)
    if file and no_config:
        raise click.UsageError("--config and --no-config contradict each other", ctx)
    from ckptsurgeon.api.checking import project
    from ckptsurgeon.cli.endings import tries_options

    settings = project.Project() if no_config else project.read(file) if file else project.find(os.getcwd())
    jobs = words.pop("jobs")
    overrides = {name: value for name, value in words.items() if name in given_names}
    report = tries_options(project.check_project(paths, settings or project.Project(), overrides, jobs=jobs, note=show.note()), ctx.command)
    if github:
        from ckptsurgeon.views import github as annotations

        show.answer(lambda: annotations.check(report, os.environ.get("GITHUB_WORKSPACE")), dict)
    else:
        show.result(report, asked=not report.ok or report.settings is not None)  # -q does not hide what a settings file silences
    return int(not report.ok)


def _explain(words: str, show: options.Show) -> int:
    from ckptsurgeon import finding_codes
    from ckptsurgeon.views import json
    from ckptsurgeon.views.text import check as text

    rows = finding_codes.TABLE if words.lower() == "all" else finding_codes.named(words)
    if not rows:
        from ckptsurgeon.errors import SettingsError
        from ckptsurgeon.hints import close_names

        close = close_names(words, [*finding_codes.BY_CODE, *(row.name for row in finding_codes.TABLE)])
        hint = f"is it {' or '.join(close)}?" if close else "ckptsurgeon check --explain all"
        raise SettingsError(f"there is no code {words!r}", key="--explain", hint=hint)
    show.answer(lambda: text.explain(rows, show.width), lambda: json.explain(rows))
    return 0
