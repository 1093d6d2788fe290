"""When a plan is a no: nothing covered, too little covered, or, under strict, a key that no rule names."""

import shlex

import pytest
import torch
from planning_support import checkpoint, model, rule

import ckptsurgeon as cs
from ckptsurgeon.api import _gates
from ckptsurgeon.api._options import RuleOptions
from ckptsurgeon.cli.main import cli
from ckptsurgeon.errors import CoverageError, PlanError, StrictError
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.report import Coverage
from ckptsurgeon.views.text.words import coverage


def test_nothing_covered_is_a_no():
    plan = make_plan([checkpoint({"a": (2,), "b": (3,)})], model({"x": (2,), "b": (4,)}))
    with pytest.raises(CoverageError) as caught:
        _gates.check(plan, RuleOptions())
    assert caught.value.exit_code == 1 and caught.value.path == "a.pt" and "ckptsurgeon diff" in (caught.value.hint or "")
    with pytest.raises(CoverageError):
        _gates.check(plan, RuleOptions(min_coverage=0.0))


def test_an_empty_target_asks_for_nothing():
    _gates.check(make_plan([checkpoint(["a"])], model([])), RuleOptions(min_coverage=1.0))
    _gates.check(make_plan([checkpoint([])], None), RuleOptions())


@pytest.mark.parametrize(
    ("given", "tensors", "elements"),
    [({"a": (90,), "b": (1,)}, 2 / 3, 91 / 100), ({"a": (90,)}, 1 / 3, 90 / 100), ({"b": (1,), "c": (9,)}, 2 / 3, 10 / 100)],
)
def test_the_least_coverage_holds_for_both_measures(given, tensors, elements):
    plan = make_plan([checkpoint(given)], model({"a": (90,), "b": (1,), "c": (9,)}))
    assert (plan.coverage.tensors, plan.coverage.elements) == (tensors, elements)
    least = min(tensors, elements)
    _gates.check(plan, RuleOptions(min_coverage=least))
    with pytest.raises(CoverageError) as caught:
        _gates.check(plan, RuleOptions(min_coverage=least + 0.001))
    assert caught.value.exit_code == 1
    with pytest.raises(CoverageError):
        _gates.check(plan, RuleOptions(min_coverage=max(tensors, elements)))


def test_a_share_that_is_none():
    plan = make_plan([checkpoint(["a"])], model(["a"]))
    for share in (-0.1, 1.1, 90, float("nan")):
        with pytest.raises(PlanError):
            _gates.check(plan, RuleOptions(min_coverage=share))
    _gates.check(plan, RuleOptions(min_coverage=1.0, strict=True))


def test_strict_refuses_what_no_rule_names():
    source, target = checkpoint({"a": (2,), "b": (3,), "c": (2,)}), model({"a": (2,), "b": (2,), "d": (2,)})
    plan = make_plan([source], target)
    _gates.check(plan, RuleOptions())
    with pytest.raises(StrictError) as caught:
        _gates.check(plan, RuleOptions(strict=True))
    assert caught.value.exit_code == 1 and {problem.partition(":")[0] for problem in caught.value.problems} == {"b", "c", "d"}
    _gates.check(make_plan([source], target, [rule("drop", "b"), rule("drop", "c"), rule("init", "d", "zeros")]), RuleOptions(strict=True))
    _gates.check(make_plan([source], target, [rule("init", "b", "zeros"), rule("rename", "c", "d")]), RuleOptions(strict=True))


def test_many_loose_keys_are_counted():
    plan = make_plan([checkpoint(["a", *(f"x{i}" for i in range(50))])], model(["a"]))
    with pytest.raises(StrictError) as caught:
        _gates.check(plan, RuleOptions(strict=True))
    assert len(caught.value.problems) == 21 and caught.value.problems[-1] == "and 30 more" and "50 keys" in caught.value.reason


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.0, "100.0 %"), (0.99999, "99.9 %"), (0.999, "99.9 %"), (0.29, "29.0 %"), (0.57, "57.0 %"), (0.0, "0.0 %"), (1e-9, "0.0 %")],
)
def test_coverage_is_never_rounded_up(share, words):
    assert coverage(Coverage(share, share)) == f"{words} of tensors, {words} of elements"


def test_what_shows_why_can_be_run(tmp_path, monkeypatch, capsys):
    """A path with a space, a root that was chosen, a live model: the hint is a command, or a call, that works."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}}, "my run.pt")
    torch.save({"x": torch.zeros(3)}, "target.pt")
    with pytest.raises(CoverageError) as caught:
        cs.merge("my run.pt", "target.pt", "out.pt", root="ema")
    command = shlex.split((caught.value.hint or "").partition("ckptsurgeon ")[2])
    assert cli.main(command, standalone_mode=False) == 0 and "--root" in command
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CoverageError) as caught:
        cs.transfer("my run.pt", model, root="ema")
    eval((caught.value.hint or "").removeprefix("see why: "), {"ckptsurgeon": cs, "model": model})
    with pytest.raises(CoverageError) as caught:
        cs.transfer({"w": torch.zeros(2)}, model)
    call = (caught.value.hint or "").removeprefix("see why: ")
    eval(call, {"ckptsurgeon": cs, "source": {"w": torch.zeros(2)}, "model": model})
    assert capsys.readouterr().out.count("state_dict → Linear") == 1


def test_a_conversion_of_which_all_is_dropped_is_a_no(tmp_path):
    torch.save({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(CoverageError, match="none is left to write"):
        cs.merge(tmp_path / "a.pt", None, tmp_path / "out.pt", drop=["*"])
    assert not (tmp_path / "out.pt").exists()
    assert cs.merge(tmp_path / "a.pt", None, tmp_path / "out.pt", drop=["a"]).transferred == ("b",)
