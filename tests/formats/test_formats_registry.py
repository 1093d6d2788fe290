"""The table of formats: each is told by its content, read by the one module that the table names, and asked by its traits."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

import ckptsurgeon as cs
from ckptsurgeon.formats import registry
from ckptsurgeon.models.verify import official

PACKAGE = Path(cs.__file__).parent
W = {"w": torch.arange(6.0).reshape(2, 3)}


def saved(folder: Path) -> dict[str, Path]:
    """A file of each format, by the format's name."""
    files = {name: folder / name for name in ("torch-zip", "torch-legacy", "safetensors", "skeleton", "npz")}
    torch.save(W, files["torch-zip"])
    torch.save(W, files["torch-legacy"], _use_new_zipfile_serialization=False)
    save_file(W, files["safetensors"])
    with files["npz"].open("wb") as file:
        numpy.savez(file, w=W["w"].numpy())
    files["skeleton"].write_text('{"version": 1, "kind": "skeleton", "tensors": [{"name": "w", "dtype": "F32", "shape": [2, 3]}]}')
    for of_one, name in (("safetensors", "safetensors-shards"), ("torch-zip", "torch-shards")):
        files[name] = folder / f"{name}.index.json"
        files[name].write_text(f'{{"weight_map": {{"w": "{of_one}"}}}}')
    kept = Path(__file__).parent / "data/dcp"
    files |= {"dcp": kept / "ranks2", "dcp-safetensors": kept / "hf2"}
    return files


def test_every_format_of_the_table_is_told_by_its_content(tmp_path: Path) -> None:
    files = saved(tmp_path)
    assert files.keys() == registry.BY_NAME.keys()
    for name, path in files.items():
        assert cs.inspect(path).format == name
        assert cs.open(path).kind == ("skeleton" if name == "skeleton" else "file")
        assert registry.named(name).official in ("", *official.READERS)


def test_a_module_is_imported_only_for_a_file_that_is_its_own(tmp_path: Path) -> None:
    modules = {one.module for one in registry.TABLE}
    code = "import sys; from ckptsurgeon import formats; formats.read(sys.argv[1]); print(*sys.modules, sep='\\n')"
    for name, path in saved(tmp_path).items():
        loaded = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout.split()
        found = {module for module in modules if f"ckptsurgeon.formats.{module}" in loaded}
        shard = {
            "safetensors-shards": "plain.safetensors",
            "torch-shards": "torch.zip",
            "dcp": "torch.zip",
            "dcp-safetensors": "plain.safetensors",
        }.get(name)
        json = {"folders.hf_shards"} if name == "skeleton" else set()  # which looks whether it is its own
        assert found == {registry.named(name).module, *([shard] if shard else []), *json}, name


def test_the_table_alone_imports_no_reader() -> None:
    code = "import sys; from ckptsurgeon.formats import registry; print(*(name for name in sys.modules if 'ckptsurgeon' in name))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if name.startswith("ckptsurgeon.formats")} == {"ckptsurgeon.formats", "ckptsurgeon.formats.registry"}


def test_no_other_module_compares_names_of_formats() -> None:
    names = set(registry.BY_NAME) | set(registry.WRITTEN)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and "format" in ast.unparse(node):
                texts = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)}
                assert not texts & names, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
                assert not ast.unparse(node.func.value).endswith(".format"), f"{path}:{node.lineno}"


def test_suffixes_stand_in_one_table() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            texts = {one.value for one in ast.iter_child_nodes(node) if isinstance(one, ast.Constant)}
            assert len(texts & set(registry.SUFFIXES)) < 2 or path.stem == "registry", f"{path}:{node.lineno}"


def test_a_format_that_is_only_read_is_no_output() -> None:
    for one in registry.TABLE:
        assert (one.word in registry.WRITTEN) is any(row.writer or row.saved for row in registry.TABLE if row.word == one.word)
    with pytest.raises(cs.CheckpointError, match="no format to write"):
        cs.merge("fixtures/net_params.pkl", None, "out.pt", format="skeleton")


def test_the_guide_names_every_format_that_may_be_allowed() -> None:
    (sentence,) = re.findall(r"`--allow`\sknows([^.]*), by content", " ".join((PACKAGE / "guide" / "gate.md").read_text().split()))
    assert set(re.findall("`([^`]+)`", sentence)) == set(registry.allowed_by())
    read = "Hugging Face folders and indexes of shards, folders of torch.distributed.checkpoint, and NumPy's npz"
    assert read in " ".join((PACKAGE / "guide" / "convert.md").read_text().split())


@pytest.mark.parametrize(
    ("first", "how", "data"),
    [
        (b"FLAT", 'lambda head: head.startswith(b"FLAT")', W["w"].numpy().tobytes()),
        (b"GGUF", 'magic=b"GGUF"', b"\x03\0\0\0{\0\0\0"),  # a stranger until then, and with 123 tensors a beginning like safetensors'
    ],
)
def test_a_new_format_is_one_module_and_one_line_of_the_table(tmp_path: Path, first: bytes, how: str, data: bytes) -> None:
    """A format that nobody knows is read, shown, checked and merged by a program that has no more of it than that."""
    module = """
from hashlib import sha256
from ckptsurgeon.tensors import Archive, Span, StateDict, TensorMeta

def read(file):
    count = (file.size - 4) // 4
    span = Span(file.path, 4, 4 * count, "w")
    tensors = {"w": TensorMeta("w", "F32", (count,), (1,), span)}
    return Archive(file.path, "flat", sha256(file.read(0, 4)).hexdigest(), (file.stamp,), (StateDict("", tensors),))
"""
    package = shutil.copytree(PACKAGE, tmp_path / "ckptsurgeon", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "formats" / "plain" / "flat.py").write_text(module)
    table = package / "formats" / "registry.py"
    end = ")\nBY_NAME:"
    assert end in table.read_text()
    table.write_text(table.read_text().replace(end, f'    Format("flat", "plain.flat", {how}),\n{end}'))
    (tmp_path / "it").write_bytes(first + data)

    def run(*words: str) -> str:
        command = [sys.executable, "-P", "-m", "ckptsurgeon", *words]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("inspect", "it").startswith("it: flat")
    run("check", "it", "--allow", "flat,torch")
    run("merge", "it", "-o", "out.pt")
    assert torch.load(tmp_path / "out.pt")["w"].numpy().tobytes() == data
    run("diff", "out.pt", "it", "--exit-code")
