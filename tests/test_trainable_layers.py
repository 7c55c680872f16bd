"""Which layers are trained when nothing is said of them."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

import tiny_training as tiny
from safesteer.trainable_layers import adapter_of_decoder, first_trained_layer
from tiny_models import multimodal_model


def _adapted() -> Any:
    return get_peft_model(tiny.model(), tiny.lora())


@pytest.mark.parametrize(
    ("settings", "config", "first"),
    [
        ({}, tiny.lora(), tiny.LAYER),
        ({}, None, tiny.LAYER),
        ({"teacher": "ema"}, tiny.lora(), tiny.LAYER),
        ({"train_layers": "all"}, tiny.lora(), None),
        # The prompt reaches every layer, a refreshed direction any.
        ({"teacher": "system_prompt"}, tiny.lora(), None),
        ({"teacher": "ema", "refresh_steps": 2}, tiny.lora(), None),
        # What `from_steered` would refuse.
        ({}, PromptTuningConfig(num_virtual_tokens=2), None),
        ({}, LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1]), None),
        ({}, LoraConfig(target_modules=["q_proj"], layers_to_transform=1), None),
        ({}, LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 2]), tiny.LAYER),
    ],
)
def test_auto_trains_from_the_steered_layer_where_it_can(
    tmp_path: Path, settings: dict[str, Any], config: Any, first: int | None
) -> None:
    args = tiny.settings(tmp_path, **settings)
    assert first_trained_layer(tiny.model(), args, tiny.steering(), config) == first


def test_auto_leaves_an_adapter_alone_that_is_there_already(tmp_path: Path) -> None:
    assert first_trained_layer(_adapted(), tiny.settings(tmp_path), tiny.steering(), None) is None
    run = tiny.trainer(tmp_path, student=_adapted())
    names = [name for name, value in run.model.named_parameters() if value.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == {0, 1, 2, 3}


@pytest.mark.parametrize(("targets", "seen"), [("all-linear", False), (["q_proj"], True)])
def test_an_adapter_for_all_linear_maps_is_the_language_model_s(targets: Any, seen: bool) -> None:
    model = multimodal_model()
    config = tiny.lora(target_modules=targets, exclude_modules=["k_proj"])
    wanted = {
        name.removeprefix("model.language_model.layers.")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".language_model.layers." in name and "k_proj" not in name
    }
    adapted = get_peft_model(model, adapter_of_decoder(config, model))
    names = {name.split(".lora_A")[0] for name, value in adapted.named_parameters() if "lora_A" in name}
    assert any("vision" in name for name in names) == seen
    assert not any("lm_head" in name for name in names)
    if not seen:
        assert {name.split(".language_model.layers.")[1] for name in names} == wanted
    assert config.exclude_modules == {"k_proj"}
    assert adapter_of_decoder(config, tiny.model()) is config


def test_without_steering_all_layers_are_trained(tmp_path: Path) -> None:
    args = tiny.settings(tmp_path, teacher="system_prompt")
    assert first_trained_layer(tiny.model(), args, None, tiny.lora()) is None


def test_the_trainer_s_default_is_auto(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, peft_config=tiny.lora())
    names = [name for name, value in run.model.named_parameters() if value.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == {2, 3}
