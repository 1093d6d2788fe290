"""What the worked conversions share: random weights, the merge with its accounts, the same output, and that no tensor hides from it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from forked import MODULES, program
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ckptsurgeon as cs

FOLDER = Path(__file__).resolve().parent
EXACT = 1e-10  # of float64 sums in another order


def rules(name: str) -> str:
    """The path of a worked example's rules."""
    return str(FOLDER / "rules" / f"{name}.toml")


def spec(call: str, module: str = "conversions_models") -> str:
    """A target as a person would write it: `path/to/file.py:factory(words)`."""
    return f"{FOLDER / module}.py:{call}"


def hf(call: str) -> str:
    """The same, of a model of transformers."""
    return spec(call, "conversions_hf")


def build(target: str) -> nn.Module:
    """The model of a spec that `spec` or `hf` wrote, in eval mode; built without ckptsurgeon."""
    path, call = target.split(".py:")
    module = importlib.import_module(Path(path).name)
    with torch.random.fork_rng():
        made: nn.Module = eval(call if "(" in call else f"{call}()", dict(vars(module)))
    return made.eval()


def source(target: str, seed: int = 1) -> nn.Module:
    """A model with random values in every tensor: norms' weights and statistics and biases too, so that no mistake can hide."""
    model = build(target)
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.copy_(torch.randint(1, 1000, tensor.shape, generator=generator))
            continue
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if key.endswith("running_var"):
            values = values.abs() + 0.5
        elif tensor.dim() < 2:
            values = 0.3 * values + (1 if key.endswith("weight") else 0)
        elif "embed" not in key and "wte" not in key:
            values = values * 2 / tensor[0].numel() ** 0.5
        tensor.copy_(values)
    return model


def save(model: nn.Module | Mapping[str, Tensor], path: Path) -> Path:
    """A state_dict as a person would save it; the suffix says how."""
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def load(path: Path) -> dict[str, Tensor]:
    """A file, by torch's or safetensors' own reader."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def loaded(path: Path, target: str) -> nn.Module:
    """The model of a spec with the values of a file, loaded strictly."""
    model = build(target)
    model.load_state_dict(load(path), strict=True)
    return model


def convert(given: Path, target: str, output: Path, name: str | Iterable[str] = (), **words: Any) -> tuple[nn.Module, Any]:
    """Merge by the rules of a worked example, hold the accounts, and load the output.

    Every target tensor must take weights and every source tensor must go somewhere, save those that `fresh` and `dropped` list.
    """
    fresh, dropped = words.pop("fresh", ()), words.pop("dropped", ())
    words.setdefault("strict", not fresh and not dropped)
    files = [rules(one) for one in ([name] if isinstance(name, str) else name)]
    report = cs.merge(given, target, output, rules=files, **words)
    account(report, fresh, dropped)
    return loaded(output, target), report


def account(report: Any, fresh: Iterable[str] = (), dropped: Iterable[str] = ()) -> None:
    """Whole coverage but for `fresh`; nothing left behind but `dropped`; the file proven against the plan and the model."""
    assert set(report.fresh) == set(fresh)
    assert {key for key, _ in report.dropped} == set(dropped)
    assert report.kept == ()
    if not fresh:
        assert report.coverage.tensors == 1.0 and (report.coverage.elements == 1.0 or report.partial)
    assert report.casts == ()
    assert report.proven
    assert report.verification is not None
    assert report.verification.ok
    assert [found for found in report.findings if found.level == "error"] == []


def back(given: Path, target: str, output: Path, name: str, original: Path, **words: Any) -> None:
    """The same rules turned round give the original file again, bit for bit."""
    account(cs.merge(given, target, output, rules=rules(name), reverse=True, **words))
    same(load(output), load(original))


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Two state_dicts are equal bit for bit."""
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def agree(found: Tensor, wanted: Tensor, within: float = EXACT) -> None:
    """Two outputs are equal but for rounding, and are outputs that tell something."""
    assert found.shape == wanted.shape
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=within)


def all_seen(model: nn.Module, run: Callable[[nn.Module], Tensor], unseen: Iterable[str] = (), within: float = EXACT) -> None:
    """The output depends on every tensor of the model, so that `agree` would have told a wrong one.

    `unseen` are patterns of those that no output can tell: a bias of keys, which softmax takes out again, and BatchNorm's counter.
    """
    with torch.no_grad():
        wanted = run(model)
        for key, tensor in model.state_dict().items():
            before = tensor.clone()
            tensor.copy_(before + 1 if not tensor.is_floating_point() else before.flatten().roll(1).reshape(before.shape) + 0.1 * before)
            moved = (run(model) - wanted).abs().max().item() > 10 * within
            tensor.copy_(before)
            assert moved != any(fnmatchcase(key, pattern) for pattern in unseen), key


def cli(*words: object, cwd: Path) -> str:
    """Run the real program; its stdout. Its answer must be yes."""
    done = program(*words, folder=cwd, modules=(*MODULES, "transformers"), NO_COLOR="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    assert done.code == 0, done
    return done.out


def cli_json(*words: object, cwd: Path) -> Any:
    """The same, as JSON."""
    return json.loads(cli(*words, "--json", cwd=cwd))


def tokens(count: int = 50, rows: int = 2, length: int = 10, seed: int = 5) -> Tensor:
    return torch.randint(0, count, (rows, length), generator=torch.Generator().manual_seed(seed))


def images(size: int = 32, channels: int = 3, seed: int = 6) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
