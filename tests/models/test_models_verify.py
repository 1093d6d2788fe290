"""A file held against a fresh model: everything that can differ is found, and all of it at once."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from ckptsurgeon.errors import DeviceError, ModelError, TargetError
from ckptsurgeon.models.init.values import tensor_bytes
from ckptsurgeon.models.target.skeleton import checkpoint_of_state_dict
from ckptsurgeon.models.verify import readback
from ckptsurgeon.models.verify.official import at_root
from ckptsurgeon.models.verify.verify import check_device, verify_on_device
from ckptsurgeon.tensors import Checkpoint, Span, TensorMeta, contiguous_stride


class Net(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def state(seed=1, classes=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(classes).state_dict()


def dense(meta):
    with open(meta.span.file, "rb") as file:
        file.seek(meta.span.offset)
        return file.read(meta.span.nbytes)


def of_safetensors(*paths, **fields):
    """A Checkpoint made here, from the JSON header, so that no reader of ours is needed."""
    tensors, metadata = {}, {}
    for path in paths:
        raw = Path(path).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        metadata |= header.pop("__metadata__", {})
        for key, row in header.items():
            begin, end = row["data_offsets"]
            span = Span(str(path), start + begin, end - begin, key)
            tensors[key] = TensorMeta(key, row["dtype"], tuple(row["shape"]), contiguous_stride(tuple(row["shape"])), span)
    form = "safetensors-shards" if len(paths) > 1 else "safetensors"
    return Checkpoint(str(paths[0]), form, "", tensors, metadata=metadata, **fields)


def of_torch(path, saved, form="torch-zip", root=""):
    """A Checkpoint of a file that torch wrote, and a `read` that gives the bytes of what was saved."""
    live = checkpoint_of_state_dict(saved)
    tensors = {
        key: TensorMeta(key, meta.dtype, meta.shape, meta.stride, Span(str(path), 0, meta.nbytes, key)) for key, meta in live.items()
    }
    checkpoint = Checkpoint(str(path), form, "", tensors, root=root, entries=live.entries)
    return checkpoint, lambda meta: tensor_bytes(saved[meta.name])


def codes(verification, level="error"):
    return sorted((finding.code, finding.key) for finding in verification.findings if finding.level == level)


@pytest.fixture
def saved(tmp_path):
    save_file(state(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_a_file_that_fits_is_proven(saved):
    done = verify_on_device(of_safetensors(saved, provenance={"fresh": ["fc.bias"]}), Net, "cpu", read=dense, inputs=("2x3x8x8",))
    assert done.ok and done.bitwise and done.findings == () and done.device == "cpu"
    assert done.tensors == len(Net().state_dict()) and done.outputs == {"output": (2, 2)} and done.fresh == ("fc.bias",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("root", ["", "model", "a.b.0.net.x"])
def test_torchs_formats_and_roots(tmp_path, legacy, root):
    values = state()
    wrapped = {"a": {"b": [{"net.x": values}]}} if "." in root else {root: values, "epoch": 3} if root else values
    torch.save(wrapped, tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint, read = of_torch(tmp_path / "net.pt", values, "torch-legacy" if legacy else "torch-zip", root)
    done = verify_on_device(checkpoint, Net, "cpu", read=read)
    assert done.ok and done.tensors == len(values) and done.findings == ()


def test_every_misfit_is_found_at_once(tmp_path):
    values = state(classes=3)
    values["extra.weight"] = torch.zeros(1)
    del values["norm.bias"]
    values["conv.bias"][1] = float("nan")
    save_file(values, tmp_path / "net.safetensors")
    done = verify_on_device(of_safetensors(tmp_path / "net.safetensors"), Net, "cpu", read=dense, inputs=("1x3x8x8",))
    assert codes(done) == [("missing", "norm.bias"), ("shape", "fc.bias"), ("shape", "fc.weight"), ("unexpected", "extra.weight")]
    assert codes(done, "warning") == [("non-finite", "conv.bias")]
    assert {code for code, _ in codes(done, "note")} == {"load", "no-forward"}
    assert done.tensors == len(Net().state_dict()) - 3 and not done.ok and done.outputs == {}


def test_a_single_bit_that_our_reader_sees_otherwise_is_found(saved):
    def read(meta):
        data = bytearray(dense(meta))
        if meta.name == "conv.weight":
            data[4 * 30] ^= 1
        return data

    done = verify_on_device(of_safetensors(saved), Net, "cpu", read=read)
    assert codes(done) == [("differs", "conv.weight")]
    assert "1 of 108 elements" in done.findings[0].message and "(1, 0, 1, 0)" in done.findings[0].message


def test_large_tensors_are_compared_piece_by_piece(saved, monkeypatch):
    monkeypatch.setattr(readback, "PIECE", 7)
    checkpoint = of_safetensors(saved)
    assert verify_on_device(checkpoint, Net, "cpu", read=dense).findings == ()

    def read(meta):
        data = bytearray(dense(meta))
        if meta.name == "conv.weight":
            data[4 * 30] ^= 1
            data[4 * 100] ^= 1
        return data

    done = verify_on_device(checkpoint, Net, "cpu", read=read)
    assert done.findings[0].message == "2 of 108 elements differ from the file, the first at (1, 0, 1, 0)"


def test_nan_payloads_and_signed_zeros_count(tmp_path):
    values = state()
    values["fc.bias"] = torch.tensor([0x7FC01234, -0x80000000], dtype=torch.int64).to(torch.int32).view(torch.float32)
    save_file(values, tmp_path / "n.safetensors")
    checkpoint = of_safetensors(tmp_path / "n.safetensors")
    assert verify_on_device(checkpoint, Net, "cpu", read=dense).ok

    def blurred(meta):
        return tensor_bytes(torch.tensor([float("nan"), 0.0])) if meta.name == "fc.bias" else dense(meta)

    done = verify_on_device(checkpoint, Net, "cpu", read=blurred)
    assert codes(done) == [("differs", "fc.bias")] and "2 of 2" in next(f for f in done.findings if f.code == "differs").message


def test_a_reader_that_gives_too_few_bytes_is_found(saved):
    done = verify_on_device(of_safetensors(saved), Net, "cpu", read=lambda meta: dense(meta)[:-1])
    assert {code for code, _ in codes(done)} == {"differs"}


def test_readers_that_see_other_keys_or_shapes_are_found(saved):
    checkpoint = of_safetensors(saved)
    tensors = dict(checkpoint.tensors)
    tensors["ghost"] = tensors.pop("fc.bias")
    bias = tensors["conv.bias"]
    tensors["conv.bias"] = TensorMeta(bias.name, bias.dtype, (2, 2), (2, 1), bias.span)
    odd = Checkpoint(checkpoint.path, checkpoint.format, "", tensors)
    assert codes(verify_on_device(odd, Net, "cpu", read=dense)) == [("reader", "conv.bias"), ("reader", "fc.bias"), ("reader", "ghost")]


def test_another_dtype_is_cast_compared_and_noted(tmp_path):
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state().items()}
    half["fc.bias"][0] = float("nan")
    save_file(half, tmp_path / "half.safetensors")
    done = verify_on_device(of_safetensors(tmp_path / "half.safetensors"), Net, "cpu", read=dense)
    assert done.ok and ("dtype", "fc.bias") in codes(done, "note") and ("dtype", "norm.num_batches_tracked") not in codes(done, "note")
    assert any(finding.message == "loaded as F32 from F16" for finding in done.findings)

    def read(meta):
        return bytes(meta.nbytes) if meta.name == "fc.weight" else dense(meta)

    wrong = verify_on_device(of_safetensors(tmp_path / "half.safetensors"), Net, "cpu", read=read)
    assert codes(wrong) == [("differs", "fc.weight")]


@pytest.mark.parametrize("finite", [False, True])
def test_values_that_are_not_finite(tmp_path, finite):
    values = state()
    values["fc.bias"] = torch.tensor([float("nan"), float("-inf")])
    save_file(values, tmp_path / "n.safetensors")
    done = verify_on_device(of_safetensors(tmp_path / "n.safetensors"), Net, "cpu", read=dense, finite=finite, inputs=("1x3x8x8",))
    tensor, output = done.findings
    assert (tensor.level, tensor.key) == ("error" if finite else "warning", "fc.bias") and "1 NaN and 1 infinite of 2" in tensor.message
    assert (output.code, output.level, output.key) == ("non-finite", "error", None)


def test_shards_are_loaded_one_after_the_other(tmp_path):
    values = state()
    keys = list(values)
    paths = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for path, part in zip(paths, (keys[:4], keys[4:]), strict=True):
        save_file({key: values[key] for key in part}, path)
    assert verify_on_device(of_safetensors(*paths), Net, "cpu", read=dense).findings == ()
    save_file({key: values[key] for key in keys[4:-1]} | {"more": torch.zeros(1)}, paths[1])
    done = verify_on_device(of_safetensors(*paths), Net, "cpu", read=dense)
    assert codes(done) == [("missing", keys[-1]), ("unexpected", "more")]
    save_file({key: values[key] for key in keys[4:-2]} | {keys[-2]: torch.zeros(9), keys[-1]: values[keys[-1]]}, paths[1])
    assert codes(verify_on_device(of_safetensors(*paths), Net, "cpu", read=dense)) == [("shape", keys[-2])]


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_shards(tmp_path, legacy):
    values = state()
    parts = [dict(list(values.items())[:4]), dict(list(values.items())[4:])]
    tensors = {}
    for index, part in enumerate(parts):
        torch.save(part, tmp_path / f"{index}.bin", _use_new_zipfile_serialization=not legacy)
        tensors |= of_torch(tmp_path / f"{index}.bin", part)[0].tensors
    checkpoint = Checkpoint(str(tmp_path), "torch-shards", "", tensors)
    done = verify_on_device(checkpoint, Net, "cpu", read=lambda meta: tensor_bytes(values[meta.name]))
    assert done.findings == () and done.tensors == len(values)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tie_that_safetensors_leaves_out_is_taken_from_its_other_name(tmp_path, device):
    model = Tied()
    save_model(model, str(tmp_path / "tied.safetensors"))
    done = verify_on_device(of_safetensors(tmp_path / "tied.safetensors"), Tied, device, read=dense)
    assert done.ok and done.tensors == 3 and [code for code, _ in codes(done, "note") if code != "meta"] == ["tied"]


def test_a_tie_that_a_torch_file_leaves_out_is_missing_as_torch_says(tmp_path):
    values = {key: tensor for key, tensor in Tied().state_dict().items() if key != "head.weight"}
    torch.save(values, tmp_path / "t.pt")
    checkpoint, read = of_torch(tmp_path / "t.pt", values)
    assert codes(verify_on_device(checkpoint, Tied, "cpu", read=read)) == [("missing", "head.weight")]


class WithExtra(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.extra = None

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_extra_state_is_loaded_and_missed(tmp_path, device):
    built = []

    def build():
        built.append(WithExtra())
        return built[-1]

    values = WithExtra().state_dict()
    torch.save(values, tmp_path / "e.pt")
    checkpoint, read = of_torch(tmp_path / "e.pt", values)
    assert verify_on_device(checkpoint, build, device, read=read).ok
    assert device == "meta" or built[0].extra == {"version": 1}
    torch.save({key: values[key] for key in ("weight", "bias")} | {"epoch": 3}, tmp_path / "e.pt")
    checkpoint, read = of_torch(tmp_path / "e.pt", torch.load(tmp_path / "e.pt"))
    assert codes(verify_on_device(checkpoint, build, device, read=read)) == [("missing", "_extra_state"), ("unexpected", "epoch")]


class Renames(Net):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        if "old.bias" in state_dict:
            state_dict["fc.bias"] = state_dict.pop("old.bias")
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_keys_that_the_models_own_code_settles_are_notes(tmp_path):
    values = state()
    values["old.bias"] = values.pop("fc.bias")
    save_file(values, tmp_path / "old.safetensors")
    done = verify_on_device(of_safetensors(tmp_path / "old.safetensors"), Renames, "cpu", read=dense)
    assert done.ok and codes(done, "note") == [("hook", "fc.bias"), ("hook", "old.bias")] and done.tensors == len(values) - 1


def test_a_loading_hook_that_fails_is_a_finding(saved):
    class Fails(Net):
        def _load_from_state_dict(self, *args):
            raise KeyError("nope")

    done = verify_on_device(of_safetensors(saved), Fails, "cpu", read=dense)
    assert codes(done) == [("load", None)] and "KeyError: 'nope'" in done.findings[0].message and done.tensors == 0


def test_what_the_official_reader_refuses_is_a_finding(tmp_path):
    values = state()
    checkpoint, read = of_torch(tmp_path / "o.pt", values)
    (tmp_path / "o.pt").write_bytes(b"PK\x03\x04 no zip at all")
    assert codes(verify_on_device(checkpoint, Net, "cpu", read=read)) == [("load", None)]
    torch.save({**values, "args": pickle.PickleBuffer}, tmp_path / "o.pt")
    done = verify_on_device(checkpoint, Net, "cpu", read=read)
    assert codes(done) == [("load", None)] and "UnpicklingError" in done.findings[0].message
    assert codes(verify_on_device(of_torch(tmp_path / "o.pt", values, root="gone")[0], Net, "cpu", read=read)) == [("load", None)]


def test_on_meta_names_shapes_and_dtypes_are_compared_and_it_says_so(tmp_path):
    values = state(classes=3)
    values["conv.weight"] = values["conv.weight"].half()
    values["more"] = values.pop("norm.bias")
    save_file(values, tmp_path / "m.safetensors")

    def build():
        with torch.device("meta"):
            return Net()

    done = verify_on_device(of_safetensors(tmp_path / "m.safetensors"), build, "meta", read=None, inputs=("1x3x8x8",))
    assert codes(done) == [("missing", "norm.bias"), ("shape", "fc.bias"), ("shape", "fc.weight"), ("unexpected", "more")]
    assert codes(done, "note") == [("dtype", "conv.weight"), ("meta", None), ("no-forward", None)]
    assert not done.bitwise and done.tensors == len(values) - 3


def test_a_builder_that_gives_a_model_on_meta_is_no_proof(saved):
    def build():
        with torch.device("meta"):
            return Net()

    done = verify_on_device(of_safetensors(saved), build, "cpu", read=dense)
    assert codes(done) == [("device", None)]


def test_errors_of_the_builder_pass_through(saved):
    with pytest.raises(TargetError, match="ZeroDivisionError"):
        verify_on_device(of_safetensors(saved), lambda: 1 / 0, "cpu", read=dense)


@pytest.mark.parametrize(
    ("name", "message"), [("nope", "not the name"), ("", "not the name"), ("cuda:97", "no device"), ("xla", "no device")]
)
def test_a_device_that_is_not_here_is_refused_before_anything_is_built(saved, name, message):
    with pytest.raises(DeviceError, match=message) as caught:
        verify_on_device(of_safetensors(saved), lambda: pytest.fail("built"), name, read=dense)
    assert "cpu" in caught.value.hint and caught.value.exit_code == 2 and "\n" not in caught.value.reason


def test_cpu_and_meta_are_always_here():
    assert check_device("cpu").type == "cpu" and check_device("meta").type == "meta"


@pytest.mark.parametrize("text", ["", "x", "1x", "1x-3", "1x3:Q9", "1,3", "1x3x", "a:F32"])
def test_a_malformed_input_is_refused_first(saved, text):
    with pytest.raises(ModelError) as caught:
        verify_on_device(of_safetensors(saved), lambda: pytest.fail("built"), "cpu", read=dense, inputs=(text,))
    assert caught.value.hint


def test_a_forward_pass_that_fails_is_a_finding(saved):
    done = verify_on_device(of_safetensors(saved), Net, "cpu", read=dense, inputs=("1x9x8x8",))
    assert codes(done) == [("forward", None)] and "1x9x8x8" in done.findings[0].message


def test_outputs_of_any_nesting_are_shown_by_place(tmp_path):
    from collections import namedtuple

    from transformers.modeling_outputs import BaseModelOutput

    pair = namedtuple("pair", "first second")

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(2, 3)
            self.drop = nn.Dropout(0.5)

        def forward(self, ids, scale):
            assert not self.training and not torch.is_grad_enabled() and ids.dtype == torch.int64
            x = self.drop(self.embed(ids)) * scale
            return {"a": [x, (ids, None)], "b": pair(x[0], 3), "c": BaseModelOutput(last_hidden_state=x, hidden_states=(x,))}

    torch.save(Many().state_dict(), tmp_path / "m.pt")
    checkpoint, _ = of_torch(tmp_path / "m.pt", torch.load(tmp_path / "m.pt"))
    values = torch.load(tmp_path / "m.pt")
    done = verify_on_device(checkpoint, Many, "cpu", read=lambda meta: tensor_bytes(values[meta.name]), inputs=("2x5:I64", "1:F32"))
    assert done.ok and done.outputs == {
        "output.a[0]": (2, 5, 3),
        "output.a[1][0]": (2, 5),
        "output.b.first": (5, 3),
        "output.c.last_hidden_state": (2, 5, 3),
        "output.c.hidden_states[0]": (2, 5, 3),
    }


def test_a_forward_pass_without_tensors_is_a_warning(tmp_path):
    class Nothing(nn.Linear):
        def forward(self, x):
            return None

    values = nn.Linear(1, 1).state_dict()
    torch.save(values, tmp_path / "m.pt")
    checkpoint, read = of_torch(tmp_path / "m.pt", values)
    done = verify_on_device(checkpoint, lambda: Nothing(1, 1), "cpu", read=read, inputs=("1x1",))
    assert done.ok and codes(done, "warning") == [("output", None)]


def test_every_dtype_is_read_back(tmp_path):
    kinds = [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.uint64, torch.float16, torch.bfloat16, torch.float64]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128, torch.int64]

    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            for index, kind in enumerate(kinds):
                self.register_buffer(f"b{index}", torch.zeros(2, 3).to(kind))
                self.register_buffer(f"s{index}", torch.zeros(()).to(kind))
                self.register_buffer(f"e{index}", torch.zeros(0, 2).to(kind))

    zeros = Buffers().state_dict()
    values = {key: (torch.arange(t.numel()).reshape(t.shape) % 2).float().to(t.dtype) for key, t in zeros.items()}
    torch.save(values, tmp_path / "b.pt")
    checkpoint, read = of_torch(tmp_path / "b.pt", values)
    done = verify_on_device(checkpoint, Buffers, "cpu", read=read)
    assert done.findings == () and done.tensors == 3 * len(kinds)
    blind = verify_on_device(checkpoint, Buffers, "cpu", read=lambda meta: b"\x7f" * meta.nbytes if meta.name[0] == "s" else read(meta))
    assert codes(blind) == sorted(("differs", f"s{index}") for index in range(len(kinds)))


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_on_an_accelerator(saved, device):
    try:
        check_device(device)
    except DeviceError:
        pytest.skip(f"no {device} on this machine")
    done = verify_on_device(of_safetensors(saved), Net, device, read=dense, inputs=("1x3x8x8",))
    assert done.ok and done.findings == () and done.outputs == {"output": (1, 2)}


def test_roots_that_are_not_there_are_none():
    assert at_root({"a": 1}, "a.b") is None and at_root({"a": {"b": 2}}, "a.c") is None and at_root([1], "x") is None
    assert at_root({"a": {"x": 1}, "a.b": {"x": 2}}, "a.b.x") == 2 and at_root({0: {"w": 1}}, "0") == {"w": 1}
