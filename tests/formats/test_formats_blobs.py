"""Blobs that are read by comparison with one that was read are what the reader of torch's zip format makes of them, whatever the bytes."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats.folders.blobs import Blobs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many tensors of few forms, in one file."""
    folder = tmp_path_factory.mktemp("blobs") / "run"
    forms = [
        torch.rand(2, 3),
        torch.rand(3, 2).t(),
        torch.rand(6),
        torch.arange(6),
        torch.rand(2, 3).to(torch.float8_e4m3fn),
        torch.rand(0, 3),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({f"{form}.{number}": forms[form].clone() for number in range(4) for form in range(len(forms))}, checkpoint_id=folder)
    return folder


def outcome(folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> Any:
    with monkeypatch.context() as patch:
        if not fast:
            patch.setattr(Blobs, "_like", lambda *_: None)
        try:
            found = cs.inspect(folder)
        except CheckpointError as error:
            return type(error), error.reason, error.key, error.problems
        records = [[span.record for span in tensor.spans] for tensor in found.state_dicts[0].tensors.values()]
        return found.state_dicts, found.fingerprint, records, found.globals, found.notes


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1 << 20), byte=st.integers(0, 255), change=st.booleans())
def test_blobs_are_what_the_reader_makes_of_them(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, byte: int, change: bool
) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    file = folder / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    if change:
        raw[place % len(raw)] = byte
    file.write_bytes(raw)
    assert outcome(folder, monkeypatch, True) == outcome(folder, monkeypatch, False)


def test_nearly_all_blobs_are_read_so(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the property would say nothing."""
    read = Blobs.value
    keys = []

    def counted(self: Blobs, file: Any, key: str, blob: Any) -> Any:
        keys.append(key)
        return read(self, file, key, blob)

    monkeypatch.setattr(Blobs, "value", counted)
    cs.inspect(saved)
    assert len([key for key in keys if not key.startswith("5.")]) <= 5  # an empty tensor has no data to be told from the rest
