"""Which layers are trained when nothing is said of them."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import tiny_training as tiny
from safesteer.trainable_layers import first_trained_layer


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


def test_without_steering_all_layers_are_trained(tmp_path: Path) -> None:
    args = tiny.settings(tmp_path, teacher="system_prompt")
    assert first_trained_layer(tiny.model(), args, None, tiny.lora()) is None


def test_the_trainer_s_default_is_auto(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, peft_config=tiny.lora())
    names = [name for name, value in run.model.named_parameters() if value.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == {2, 3}
