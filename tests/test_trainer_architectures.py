"""Every architecture through direction, teacher, safety tokens and two training steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_training as tiny
from safesteer.direction import DirectionSettings, find_refusal_direction
from safesteer.modeling import decoder_layers
from safesteer.prompts import PromptSet
from safesteer.safety_tokens import SafetyTokenSettings, find_safety_tokens
from safesteer.trainer import SafeSteerTrainer
from tiny_models import KINDS

# Random weights refuse nothing, so the openers are given and the filter is off.
DIRECTION = DirectionSettings(
    train_harmful=6,
    train_harmless=6,
    validation_harmful=4,
    validation_harmless=4,
    max_kl=1e9,
    min_induction=-1e9,
    filter_prompts=False,
    coefficient=2.0,
    refusal_token_ids=(40, 41),
)
TOKENS = SafetyTokenSettings(horizon=3, votes_per_position=20, size=10, samples=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [True, False])
def test_every_architecture_trains(tmp_path: Path, kind: str, adapter: bool) -> None:
    student, chat = tiny.model(kind), tiny.chat()
    direction: Any = find_refusal_direction(
        student, chat, PromptSet(tiny.HARMFUL, "harmful"), PromptSet(tiny.HARMLESS, "harmless"), DIRECTION
    )
    tokens = find_safety_tokens(student, chat, tiny.HARMLESS[:4], direction.steering, TOKENS)
    assert 0 < len(tokens.ids) <= 10
    before = {name: value.clone() for name, value in student.named_parameters()}
    run = SafeSteerTrainer(
        student,
        tiny.settings(
            tmp_path,
            max_steps=2,
            warmup_steps=0,
            anchor_fraction=0.5,
            train_layers="from_steered",
            learning_rate=0.01,
        ),
        tiny.HARMFUL,
        tiny.HARMLESS,
        chat,
        direction,
        tokens,
        tiny.lora() if adapter else None,
    )
    run.train()
    first, second = (entry for entry in run.state.log_history if "loss" in entry)
    assert first["divergence"] > 0
    assert first["anchor/divergence"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < first["student_mass"] < 1
    assert second["loss"] > 0

    layers = list(decoder_layers(run.model))
    trained = [any(value.requires_grad for value in layer.parameters()) for layer in layers]
    assert trained == [index >= direction.layer for index in range(len(layers))]
    inner = run.model.get_base_model() if adapter else run.model
    after = {name.replace(".base_layer", ""): value for name, value in inner.named_parameters()}
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    if adapter:
        assert not moved
        assert all(value.any() for name, value in after.items() if "lora_B" in name)
    else:
        assert moved == {name for name, value in after.items() if value.requires_grad}
