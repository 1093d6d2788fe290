"""Where an output may stand: on its source, behind links, among shards, beside other writers; who may read it, and when it lasts."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from writing_support import PROGRAM, Call, Ended, calls, content, environment, inside, loaded, one_error, run, setting, state, writing

import ckptsurgeon as cs
from ckptsurgeon.errors import OutputError, UnreadableError


def halves(path: Path) -> dict[str, torch.dtype]:
    """The dtypes of a file's tensors."""
    return {key: tensor.dtype for key, tensor in loaded(path).items()}


def itself(folder: Path) -> str:
    return "a.pt"


def symbolic(folder: Path) -> str:
    (folder / "link.pt").symlink_to("a.pt")
    return "link.pt"


def hard(folder: Path) -> str:
    os.link(folder / "a.pt", folder / "hard.pt")
    return "hard.pt"


@pytest.mark.parametrize("name", [itself, symbolic, hard])
def test_an_output_that_is_its_source(name: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = setting(tmp_path, 8)
    output, old = name(folder), (tmp_path / "a.pt").read_bytes()
    assert inside(monkeypatch, folder, "merge", "a.pt", "-o", output, "--dtype", "F16") == 2
    assert (folder / "a.pt").read_bytes() == old
    before = set(os.listdir(folder))
    assert inside(monkeypatch, folder, "merge", "a.pt", "-o", output, "--dtype", "F16", "--overwrite") == 0
    assert set(halves(folder / output).values()) == {torch.float16}
    assert set(os.listdir(folder)) == before
    if name is hard:
        assert (folder / "a.pt").read_bytes() == old  # another name of the old file keeps the old file
    if name is symbolic:
        assert (folder / output).is_symlink()


def test_an_output_that_is_the_target_or_behind_a_link_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = setting(tmp_path, 8)
    (folder / "link.pt").symlink_to(folder / "b.pt")
    expected = loaded(folder / "b.pt")["third"].tolist()
    for output in ("b.pt", "link.pt"):
        assert inside(monkeypatch, folder, "merge", "a.pt", "b.pt", "-o", output) == 2
        assert inside(monkeypatch, folder, "merge", "a.pt", "b.pt", "-o", output, "--overwrite") == 0
        found = loaded(folder / "b.pt")
        assert found["third"].tolist() == expected and found["first"].tolist() == loaded(folder / "a.pt")["first"].tolist()


def shards(folder: Path) -> Path:
    """A source in two shards."""
    home = folder / "shards"
    home.mkdir()
    names = {"first": "model-00001-of-00002.safetensors", "second": "model-00002-of-00002.safetensors"}
    for key, name in names.items():
        save_file(state(key, size=8), home / name)
    (home / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return home


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "link.safetensors"])
def test_a_shard_of_the_source_is_not_replaced(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = shards(setting(tmp_path, 8))
    (home / "link.safetensors").symlink_to("model-00002-of-00002.safetensors")
    before = content(home)
    for sources in (["shards"], ["a.pt", "shards"]):
        capfd.readouterr()
        code = inside(monkeypatch, tmp_path, "merge", *sources, "-o", home / name, "--overwrite", "--format", "safetensors")
        one_error(Ended(code, *capfd.readouterr()), f"{name}: is one of the 3 files of")
        assert content(home) == before


def test_a_file_beside_the_shards_of_the_source(tmp_path: Path) -> None:
    home = shards(tmp_path)
    cs.merge(home, None, home / "model.safetensors")
    assert sorted(os.listdir(home))[-2:] == ["model.safetensors", "model.safetensors.index.json"] and len(os.listdir(home)) == 4
    assert list(cs.open(home / "model.safetensors")) == ["first", "second"]


def test_an_output_that_is_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    folder = setting(tmp_path, 8)
    assert inside(monkeypatch, folder, "plan", "a.pt", "b.pt", "-o", "plan.json") == 0
    plan = (folder / "plan.json").read_bytes()
    for words in (("apply", "plan.json", "-o", "plan.json"), ("apply", "plan.json", "-o", "plan.json", "--overwrite")):
        capfd.readouterr()
        one_error(Ended(inside(monkeypatch, folder, *words), *capfd.readouterr()), "does not say which format to write")
    assert (folder / "plan.json").read_bytes() == plan
    assert inside(monkeypatch, folder, "apply", "plan.json", "-o", "plan.json", "--overwrite", "--format", "torch") == 0  # as one wishes
    assert set(loaded(folder / "plan.json")) == {"first", "second", "third"}


@pytest.mark.parametrize("words", [("plan", "a.pt", "b.pt"), ("skeleton", "a.pt")], ids=lambda words: words[0])
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_a_checkpoint_is_not_replaced_by_json(
    words: tuple[str, ...], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = setting(tmp_path, 8)
    if kind == "safetensors":
        save_file(state("first", "second", seed=1, size=8), folder / "a.pt")
    elif kind == "legacy":
        torch.save(state("first", "second", seed=1, size=8), folder / "a.pt", _use_new_zipfile_serialization=False)
    before = content(folder)
    ended = Ended(inside(monkeypatch, folder, *words, "-o", "a.pt", "--overwrite"), *capfd.readouterr())
    one_error(ended, "a.pt: is no text, and would be replaced by JSON")
    assert content(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_writers_at_once_one_wins_whole(overwrite: bool, tmp_path: Path) -> None:
    folder = setting(tmp_path / "in", 200)
    whole = []
    for seed in range(4):
        torch.save(state("first", "second", seed=10 + seed, size=200), folder / f"{seed}.pt")
        cs.merge(folder / f"{seed}.pt", folder / "b.pt", tmp_path / f"{seed}.safetensors", provenance=False)
        whole.append((tmp_path / f"{seed}.safetensors").read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    flags = ["--no-provenance", *(["--overwrite"] if overwrite else [])]
    writers = [
        subprocess.Popen(
            [*PROGRAM, "merge", f"{seed}.pt", "b.pt", "-o", out / "out.safetensors", *flags],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for seed in range(4)
    ]
    ended = [Ended(writer.wait(), *writer.communicate()) for writer in writers]
    assert (out / "out.safetensors").read_bytes() in whole and os.listdir(out) == ["out.safetensors"]
    winners = [place for place, one in enumerate(ended) if one.code == 0]
    if overwrite:
        assert winners == [0, 1, 2, 3]
    else:
        assert len(winners) == 1 and (out / "out.safetensors").read_bytes() == whole[winners[0]]
        for one in ended:
            if one.code:
                one_error(one, "out.safetensors: exists already", "--overwrite")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_output_honours_the_umask(
    mask: int, commands: dict[str, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = setting(tmp_path, 8)
    before = os.umask(mask)
    try:
        assert inside(monkeypatch, folder, "plan", "a.pt", "b.pt", "-o", "plan.json") == 0
        for words in commands.values():
            assert inside(monkeypatch, folder, *words) == 0
            output = folder / words[words.index("-o") + 1]
            assert stat.S_IMODE(output.stat().st_mode) == 0o666 & ~mask
            output.unlink()
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o664, 0o755])
def test_a_replaced_output_keeps_its_permissions_and_nobody_sees_more_meanwhile(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = setting(tmp_path, 8)
    (folder / "out.pt").write_bytes(b"old")
    (folder / "out.pt").chmod(mode)
    seen = []
    real = os.fsync

    def fsync(fd: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(fd).st_mode))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    cs.merge(folder / "a.pt", folder / "b.pt", folder / "out.pt", overwrite=True)
    assert stat.S_IMODE((folder / "out.pt").stat().st_mode) == mode
    assert seen and not seen[0] & ~(mode | 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_replaced_output_keeps_its_owner_and_group(tmp_path: Path) -> None:
    folder = setting(tmp_path, 8)
    (folder / "out.pt").write_bytes(b"old")
    os.chown(folder / "out.pt", 12345, 54321)
    (folder / "out.pt").chmod(0o640)
    cs.merge(folder / "a.pt", folder / "b.pt", folder / "out.pt", overwrite=True)
    found = (folder / "out.pt").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 54321, 0o640)


def test_where_the_group_can_not_be_kept_ours_does_not_read_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = setting(tmp_path, 8)
    (folder / "out.pt").write_bytes(b"old")
    (folder / "out.pt").chmod(0o664)
    real = os.stat

    def elsewhere(path: object, **options: object) -> os.stat_result:
        found = real(path, **options)  # type: ignore[arg-type]
        if str(path).endswith("out.pt"):
            return os.stat_result((*found[:4], found.st_uid + 1, found.st_gid + 1, *found[6:]))
        return found

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", elsewhere)
        patch.setattr(os, "fchown", refused)
        cs.merge(folder / "a.pt", folder / "b.pt", folder / "out.pt", overwrite=True)
    assert stat.S_IMODE((folder / "out.pt").stat().st_mode) == 0o604


def test_an_existing_output_is_told_before_any_input_is_read(tmp_path: Path) -> None:
    (tmp_path / "out.pt").write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already"):
        cs.merge(tmp_path / "missing.pt", None, tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == b"old"
    with pytest.raises(UnreadableError, match="does not exist"):
        cs.merge(tmp_path / "missing.pt", None, tmp_path / "new.pt")


def only(found: list[Call], pattern: str) -> int:
    """The place of the last call that is like a pattern."""
    return max(place for place, call in enumerate(found) if re.search(pattern, call.line))


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwritten"])
def test_file_and_folder_are_synced_before_the_command_says_done(
    overwrite: bool, commands: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    names = commands if not overwrite else {"merge": commands["merge"]}
    for name, words in names.items():
        folder = setting(tmp_path / name, 8)
        cs_plan = run(folder, "plan", "a.pt", "b.pt", "-o", "plan.json")
        assert cs_plan.code == 0
        if overwrite:
            (folder / words[words.index("-o") + 1]).write_bytes(b"old")
        found = writing(calls(folder, *words, *(["--overwrite"] if overwrite else [])))
        found = [call for call in found if call.thread == found[0].thread]  # another one may sync too, meanwhile
        temporary = found[0].line.rpartition("= ")[2]
        taken = only(found, r"rename\(" if overwrite else r" link\(")
        home = next(place for place in range(taken, len(found)) if "O_DIRECTORY" in found[place].line)
        fd = found[home].line.rpartition("= ")[2]
        written = only(found, rf"pwrite64\({temporary},|copy_file_range\(\d+, \[\d+\], {temporary},")
        synced = only(found[:taken], rf"fsync\({temporary}[ )]")
        lasting = next(place for place in range(home, len(found)) if re.search(rf"fsync\({fd}[ )]", found[place].line))
        said = next(place for place, call in enumerate(found) if re.search(r" write\([12], \"\w", call.line))
        assert written < synced < taken < home < lasting < said, name
