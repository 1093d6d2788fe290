"""What transfer puts into models that are spread over ranks, against torch's own load into the model on one machine."""

from __future__ import annotations

from pathlib import Path

from checks import check, on_all, same, saved, seeded, sharded

import ckptsurgeon as cs


@check(2, 4)
def one_file_into_fsdp(folder: Path) -> None:
    source = seeded(1)
    path = saved(source.state_dict(), folder / "net.safetensors")
    model = sharded(seeded(2))
    report = cs.transfer(path, model)
    assert len(set(on_all(str(report)))) == 1
    assert set(report.transferred) == set(source.state_dict())
    same(model, source.state_dict())


@check(2)
def a_torch_file_with_its_root(folder: Path) -> None:
    source = seeded(1)
    path = saved({"model": source.state_dict(), "epoch": 3}, folder / "net.pt")
    model = sharded(seeded(2))
    assert cs.transfer(path, model, root="model").roots == ("model",)
    same(model, source.state_dict())
