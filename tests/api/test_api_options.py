"""The public keywords of a call are collected once, into frozen options that are handed down whole."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon import api
from ckptsurgeon.api._options import GroupOptions, OutputOptions, RuleOptions, TrainingOptions, collect
from ckptsurgeon.errors import ModelError, PlanError, RuleError

CLASSES = (RuleOptions, OutputOptions, TrainingOptions, GroupOptions)
# By verb, the kinds of options that it collects, and the keywords that are its own.
COLLECTED = {
    "plan": ((RuleOptions,), {"full", "max_shard_size"}),
    "merge": ((RuleOptions, OutputOptions, TrainingOptions), set()),
    "apply": ((OutputOptions,), set()),
    "transfer": ((RuleOptions, TrainingOptions), set()),
    "diff": ((RuleOptions,), set()),
    "match": ((RuleOptions,), {"values", "forward", "source_model", "tolerance"}),
    "param_groups": ((GroupOptions,), set()),
    "groups": ((GroupOptions,), set()),
}


def keywords(verb: str) -> dict[str, object]:
    return {name: one.default for name, one in inspect.signature(getattr(api, verb)).parameters.items() if one.kind is one.KEYWORD_ONLY}


@pytest.mark.parametrize("verb", COLLECTED)
def test_every_keyword_of_a_verb_is_an_option_with_the_same_default(verb: str) -> None:
    kinds, own = COLLECTED[verb]
    options = {field.name: field.default for kind in kinds for field in fields(kind)}
    for name, default in keywords(verb).items():
        if name not in own | {"note", "progress"}:
            assert name in options and default in (options[name], inspect.Parameter.empty), name


def test_every_option_is_a_keyword_of_a_verb() -> None:
    every = {name for verb in COLLECTED for name in keywords(verb)} | {"output"}
    for kind in CLASSES:
        assert {field.name for field in fields(kind)} <= every, kind
        with pytest.raises(FrozenInstanceError):
            collect(kind, {"output": "a.pt"}).extra = 1  # type: ignore[union-attr]


def test_options_that_are_iterators_are_read_once() -> None:
    model = nn.Linear(2, 2)
    wide = {"weight": torch.full((2, 2), 1e300, dtype=torch.float64), "bias": torch.zeros(2)}
    cs.transfer(wide, model, allow_cast=iter(["weight"]), rename=iter([("none.{p}", "other.{p}")][:0]))
    assert torch.isinf(model.weight).all()
    assert TrainingOptions(optimizer_names=iter(["a", "b"])).optimizer_names == ("a", "b")  # type: ignore[arg-type]


def test_what_contradicts_itself_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(PlanError, match="no match is asked for"):
        cs.plan("not there.pt", accept_uncertain=True)
    with pytest.raises(RuleError):
        cs.plan("not there.pt", allow_cast=["{"])
    with pytest.raises(ModelError, match="can't be 'modell'"):
        cs.transfer("not there.pt", nn.Linear(1, 1), optimizer_names="modell")
