"""What the guide says one writes in other libraries is there in them: their sources are read, and imported only where a test runs them."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from pages import PAGES

# By library: a function or class of a module, and the parameters that the page gives it by name.
LEFT = {
    "torch": {"nn.modules.module:Module.load_state_dict": ("strict",)},
    "transformers": {
        "modeling_utils:PreTrainedModel.from_pretrained": ("ignore_mismatched_sizes", "kwargs"),
        "modeling_utils:PreTrainedModel.resize_token_embeddings": (),
        "trainer:Trainer.train": ("resume_from_checkpoint",),
    },
    "timm": {
        "models._factory:create_model": ("checkpoint_path", "kwargs"),
        "models._helpers:load_checkpoint": ("use_ema", "remap", "filter_fn"),
        "models._manipulate:adapt_input_conv": (),
        "layers.pos_embed:resample_abs_pos_embed": (),
        "optim._param_groups:param_groups_layer_decay": ("layer_decay",),
        "utils.model:freeze": (),
    },
    "mmengine": {
        "runner.checkpoint:load_checkpoint": ("revise_keys",),
        "runner.runner:Runner.__init__": ("load_from", "resume"),
        "model.weight_init:PretrainedInit.__init__": ("checkpoint", "prefix"),
        "optim.optimizer.default_constructor:DefaultOptimWrapperConstructor.__init__": ("paramwise_cfg",),
    },
    "monai": {
        "networks.utils:copy_model_state": ("mapping", "dst_prefix", "exclude_vars"),
        "networks.utils:freeze_layers": ("freeze_vars",),
        "handlers.checkpoint_loader:CheckpointLoader.__init__": ("strict", "strict_shape"),
        "optimizers.utils:generate_param_groups": ("layer_matches", "match_types", "lr_values"),
    },
}
ROWS = [(library, name, parameters) for library, names in LEFT.items() for name, parameters in names.items()]


def definition(library: str, name: str) -> ast.AST:
    """Where a library's source defines a name; the test is skipped where the library is not installed."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{library} is not installed")
    module, _, path = name.partition(":")
    node: ast.AST = ast.parse(Path(spec.submodule_search_locations[0], *module.split(".")).with_suffix(".py").read_text())
    for part in path.split("."):
        (node,) = [each for each in getattr(node, "body", []) if getattr(each, "name", None) == part][-1:]
    return node


@pytest.mark.parametrize(("library", "name", "parameters"), ROWS, ids=[f"{library}.{name}" for library, name, _ in ROWS])
def test_a_left_side_is_what_one_writes_there(library: str, name: str, parameters: tuple[str, ...]) -> None:
    node = definition(library, name)
    taken = {arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)}
    assert set(parameters) <= taken
    text = PAGES["coming-from"].read_text()
    assert all(re.search(rf"\b{word}\b", text) for word in parameters if word != "kwargs")


def test_what_transformers_takes_beside_its_parameters() -> None:
    source = ast.unparse(definition("transformers", "modeling_utils:PreTrainedModel.from_pretrained"))
    for word in ("output_loading_info", "key_mapping"):
        assert f"kwargs.pop('{word}'" in source and word in PAGES["coming-from"].read_text()
