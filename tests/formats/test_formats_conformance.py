"""One suite of what every format must read right, held against the official libraries; each format inherits it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from formats_support import assert_same, only, sample, save_legacy, save_zip, sharing, sharing_read
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.dtypes import TABLE
from ckptsurgeon.formats import read
from ckptsurgeon.tensors import find_ties

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")
Tensors = dict[str, torch.Tensor]


def _names() -> Tensors:
    names = [
        "a b",
        "naïve.ключ",
        "模型",
        "😀",
        'quote"\\',
        "tab\there",
        "",
        ".",
        "a..b",
        "x" * 500,
        "new\nline",
        "\x7f",
        "__metadata",
        "\x00",
    ]
    return {name: torch.full((2,), float(index)) for index, name in enumerate(names)}


DENSE: dict[str, Callable[[], Tensors]] = {
    "plain": lambda: {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4)},
    "zero_dim": lambda: {"count": torch.tensor(7), "scale": torch.tensor(0.5, dtype=torch.float16)},
    "empty": lambda: {"none": torch.empty(0), "flat": torch.empty(3, 0, 2), "some": torch.ones(2), "also": torch.empty(0, 5)},
    "one_element": lambda: {"x": torch.ones(1, 1, 1, 1), "y": torch.ones(1)},
    "many_dims": lambda: {"x": torch.randn(1, 2, 1, 3, 1, 2, 1, 1)},
    "names": _names,
    "many": lambda: {f"layers.{index}.weight": torch.full((3,), index) for index in range(2500)},
    "nothing_but_order": lambda: {name: torch.ones(1) for name in "zyxab"},
}


class Conformance:
    """What a format's tests inherit."""

    codes: ClassVar[list[str]] = [row.code for row in TABLE if row.safetensors]

    def save(self, tensors: Any, path: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path) -> Tensors:
        raise NotImplementedError

    def check(self, tensors: Any, path: Path) -> None:
        self.save(tensors, path)
        expected = self.load(path)
        found = only(read(str(path)))
        assert_same(found.tensors, expected)
        assert found.root == "" and not found.entries

    @pytest.mark.parametrize("case", DENSE)
    def test_reads_what_the_library_reads(self, case: str, tmp_path: Path) -> None:
        self.check(DENSE[case](), tmp_path / "it")

    @pytest.mark.parametrize("code", [row.code for row in TABLE])
    @pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 2)])
    def test_every_dtype(self, code: str, shape: tuple[int, ...], tmp_path: Path) -> None:
        if code not in self.codes:
            pytest.skip("not in this format")
        self.check({"x": sample(code, shape), "y": sample(code, (3,), seed=1)}, tmp_path / "it")

    def test_all_dtypes_in_one_file(self, tmp_path: Path) -> None:
        self.check({code: sample(code, (3,)) for code in self.codes}, tmp_path / "it")

    def test_the_suffix_tells_nothing(self, tmp_path: Path) -> None:
        self.save(DENSE["plain"](), tmp_path / "it")
        plain = only(read(str(tmp_path / "it")))
        for suffix in (".safetensors", ".pt", ".pkl", ".index.json"):
            renamed = (tmp_path / "it").rename(tmp_path / f"it{suffix}")
            assert only(read(str(renamed))).tensors.keys() == plain.tensors.keys()
            renamed.rename(tmp_path / "it")

    def test_the_fingerprint_is_of_the_content(self, tmp_path: Path) -> None:
        self.save({"x": torch.ones(3)}, tmp_path / "it")
        (tmp_path / "copy").write_bytes((tmp_path / "it").read_bytes())
        self.save({"x": torch.ones(4)}, tmp_path / "other")
        one, copy, other = (read(str(tmp_path / name)).fingerprint for name in ("it", "copy", "other"))
        assert one == copy != other

    def test_notes_the_file_as_it_was(self, tmp_path: Path) -> None:
        self.save(DENSE["plain"](), tmp_path / "it")
        (stamp,) = read(str(tmp_path / "it")).files
        status = (tmp_path / "it").stat()
        assert (stamp.size, stamp.mtime_ns, stamp.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)


class TorchConformance(Conformance):
    """What only torch's own formats hold: strides, shared storages, order, `_metadata`."""

    codes: ClassVar[list[str]] = [row.code for row in TABLE]

    def load(self, path: Path) -> Tensors:
        return dict(torch.load(path, weights_only=True))

    def check(self, tensors: Any, path: Path) -> None:
        super().check(tensors, path)
        expected, found = self.load(path), only(read(str(path))).tensors
        assert list(found) == list(expected)
        assert sharing_read(found) == sharing({key: tensor for key, tensor in expected.items() if tensor.numel()})

    @pytest.mark.parametrize(
        "make",
        [
            lambda x: {"x": x.t()},
            lambda x: {"x": x[1:, ::2]},
            lambda x: {"x": x[2:2]},
            lambda x: {"x": x[0].expand(5, 6)},
            lambda x: {"x": torch.ones(1).expand(3, 4)},
            lambda x: {"x": x.as_strided((3, 3), (2, 1), 1)},
            lambda x: {"x": x[:, 1], "y": x[:, 1], "z": x},
            lambda x: {"top": x[:2], "bottom": x[2:], "whole": x},
            lambda x: {"x": x, "same": x, "detached": x.detach()},
            lambda x: {"x": x.permute(1, 0).unsqueeze(1)},
            lambda x: {"x": x.to(memory_format=torch.preserve_format)[None, None].to(memory_format=torch.channels_last)},
            lambda x: {"x": torch.nn.Parameter(x), "y": torch.nn.Parameter(x.clone(), requires_grad=False)},
            lambda x: {"x": torch.nn.Buffer(x)},
            lambda x: {"only_part": x.clone()[3:]},
        ],
    )
    def test_views(self, make: Callable[[torch.Tensor], Tensors], tmp_path: Path) -> None:
        self.check(make(torch.arange(24.0).reshape(4, 6)), tmp_path / "it")

    @pytest.mark.parametrize("code", ["F32", "BF16", "U16", "F8_E4M3", "C128", "BOOL", "U64"])
    def test_views_of_every_kind_of_storage(self, code: str, tmp_path: Path) -> None:
        if code not in self.codes:
            pytest.skip("not in this format")
        base = sample(code, (4, 6))
        self.check({"part": base[1:3, 2:], "turned": base.t(), "whole": base}, tmp_path / "it")

    def test_ties(self, tmp_path: Path) -> None:
        weight = torch.randn(3, 4)
        self.check(OrderedDict(embed=weight, head=weight, other=weight.clone(), turned=weight.t()), tmp_path / "it")
        assert find_ties(only(read(str(tmp_path / "it"))).tensors) == (("embed", "head"),)

    def test_metadata(self, tmp_path: Path) -> None:
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        state = model.state_dict()
        self.check(state, tmp_path / "it")
        assert only(read(str(tmp_path / "it"))).module_metadata == dict(state._metadata)

    def test_parameters_with_attributes(self, tmp_path: Path) -> None:
        weight = torch.nn.Parameter(torch.randn(2))
        weight.note = "mine"
        self.check({"x": weight}, tmp_path / "it")

    def test_gradient_hooks_and_requires_grad_change_nothing(self, tmp_path: Path) -> None:
        self.check({"x": torch.randn(3, requires_grad=True)}, tmp_path / "it")


class TestTorchZip(TorchConformance):
    def save(self, tensors: Any, path: Path) -> None:
        save_zip(tensors, path)


class TestTorchZipHighestProtocol(TorchConformance):
    def save(self, tensors: Any, path: Path) -> None:
        torch.save(tensors, path, pickle_protocol=5)

    def load(self, path: Path) -> Tensors:
        return dict(torch.load(path, weights_only=False))


class TestTorchLegacy(TorchConformance):
    codes: ClassVar[list[str]] = [row.code for row in TABLE if row.storage_class]

    def save(self, tensors: Any, path: Path) -> None:
        save_legacy(tensors, path)

    @pytest.mark.parametrize("code", [row.code for row in TABLE if not row.storage_class])
    def test_dtypes_that_torch_saves_but_does_not_load(self, code: str, tmp_path: Path) -> None:
        base = sample(code, (4, 6))
        tensors = {"part": base[1:3, 2:], "turned": base.t(), "plain": sample(code, (5,), seed=1), "typed": torch.randn(3)}
        self.save(tensors, tmp_path / "it")
        with pytest.raises(AttributeError):  # when torch learns it, this file goes to the suite above
            self.load(tmp_path / "it")
        assert_same(only(read(str(tmp_path / "it"))).tensors, tensors)


class TestSafetensors(Conformance):
    def save(self, tensors: Any, path: Path) -> None:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    def load(self, path: Path) -> Tensors:
        return safetensors.torch.load_file(path)

    def test_metadata(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "it", metadata={"format": "pt", "ключ": 'v"\n'})
        with safetensors.safe_open(tmp_path / "it", "pt") as official:
            assert read(str(tmp_path / "it")).metadata == official.metadata()

    def test_no_tensors(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({}, tmp_path / "it")
        assert only(read(str(tmp_path / "it"))).tensors == {}


SUITES: list[Conformance] = [TestTorchZip(), TestTorchZipHighestProtocol(), TestTorchLegacy(), TestSafetensors()]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: type(suite).__name__)
@given(data=st.data())
@settings(max_examples=examples(60), deadline=None)
def test_random_state_dicts(suite: Conformance, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
    names = data.draw(st.lists(text, unique=True, min_size=1, max_size=6))
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    tensors = {name: sample(data.draw(st.sampled_from(suite.codes)), data.draw(shapes), seed=index) for index, name in enumerate(names)}
    suite.check(tensors, tmp_path_factory.getbasetemp() / f"{type(suite).__name__}.bin")
