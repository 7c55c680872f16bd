"""The dry run's numbers, against real models and closed forms."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, PreTrainedModel

from safesteer.console import RunConsole
from safesteer.errors import SafeSteerError
from safesteer.plan import ModelShape, estimate_memory, make_plan, model_shape
from safesteer.recipes import build_settings
from safesteer.settings import DistillationSettings, ModelSettings
from safesteer.training_arguments import lora_config
from tiny_models import chatml_tokenizer, tiny_model


def _config_only(model: PreTrainedModel, folder: Path) -> ModelSettings:
    """Keep nothing of a model but its configuration."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    return ModelSettings(name=str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3", "gpt_neox", "qwen3_moe"])
def test_the_shape_read_from_the_configuration_is_the_model_s(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    settings = DistillationSettings(lora_rank=3)
    shape = model_shape(_config_only(model, tmp_path / kind), settings)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    adapted = get_peft_model(model, lora_config(settings))
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert shape.adapter_parameters == trained


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt_neox"])
def test_the_rollout_s_cache_is_what_the_model_caches(kind: str, tmp_path: Path) -> None:
    # GPT-NeoX has a head of keys and values per head of queries, and would ignore another number.
    model = tiny_model(kind, num_key_value_heads=4 if kind == "gpt_neox" else 2)
    settings = DistillationSettings(batch_size=6, max_completion_length=9)
    estimate = estimate_memory(
        model_shape(_config_only(model, tmp_path / kind), settings),
        ModelSettings(name="x", device="cpu"),
        settings,
        prompt_tokens=5,
    )
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(6, 14, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert estimate.rollout_cache == held


SHAPE = ModelShape(
    parameters=1000,
    adapter_parameters=28,
    layers=2,
    hidden_size=16,
    intermediate_size=40,
    query_width=16,
    key_value_width=8,
    vocabulary=100,
    dtype=torch.bfloat16,
)


@pytest.mark.parametrize(
    ("device", "settings", "wanted"),
    [
        # On a GPU the frozen base stays in the checkpoint's bfloat16, on the CPU it is float32.
        ("cuda", {}, (2000, 0, 4 * 28, 4 * 28, 2 * 4 * 28)),
        ("cpu", {}, (4000, 0, 4 * 28, 4 * 28, 2 * 4 * 28)),
        ("cuda", {"teacher": "frozen_copy"}, (2000, 2000, 112, 112, 224)),
        ("cuda", {"lora": False}, (4000, 4000, 0, 4000, 8000)),
        ("cuda", {"lora": False, "master_dtype": "bfloat16"}, (2000, 2000, 0, 2000, 4000)),
    ],
)
def test_weights_gradients_and_optimizer_are_counted_exactly(
    device: str, settings: dict[str, object], wanted: tuple[int, ...]
) -> None:
    distillation = dataclasses.replace(DistillationSettings(), **settings)
    estimate = estimate_memory(
        SHAPE if distillation.lora else dataclasses.replace(SHAPE, adapter_parameters=0),
        ModelSettings(name="x", device=device),
        distillation,
        prompt_tokens=10,
    )
    counted = (
        estimate.weights,
        estimate.teacher_copy,
        estimate.adapter,
        estimate.gradients,
        estimate.optimizer,
    )
    assert counted == wanted
    assert estimate.peak == sum(wanted) + max(estimate.activations, estimate.rollout_cache)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing() -> None:
    def activations(**settings: object) -> int:
        distillation = DistillationSettings(divergence_chunk_size=1, **settings)  # type: ignore[arg-type]
        model = ModelSettings(name="x", device="cuda")
        return estimate_memory(SHAPE, model, distillation, prompt_tokens=88).activations

    tokens, logits = 88 + 512, 5 * 4 * 100
    layer = 16 * (4 * 2 + 8) + (2 * 16 + 2 * 8 + 4 * 40) * 2
    assert activations(micro_batch_size=1) == 2 * layer * tokens + logits
    assert activations(micro_batch_size=4) == 4 * 2 * layer * tokens + logits
    assert (
        activations(micro_batch_size=1, gradient_checkpointing=True) == (layer + 2 * 16 * 2) * tokens + logits
    )


def test_a_plan_counts_steps_and_candidates_without_weights_and_writes_nothing(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    _config_only(tiny_model("qwen3", vocab_size=len(chatml_tokenizer())), model)
    chatml_tokenizer().save_pretrained(model)
    for name in ("harmful", "harmless"):
        (tmp_path / f"{name}.json").write_text(json.dumps([f"{name} prompt {i}" for i in range(20)]))
    settings = build_settings(
        {
            "model": {"name": str(model), "device": "cpu"},
            "prompts": {name: str(tmp_path / f"{name}.json") for name in ("harmful", "harmless")},
            "distillation": {"batch_size": 8, "anchor_fraction": 0.25, "epochs": 3},
            "run": {"output": str(tmp_path / "run")},
        }
    )
    plan = make_plan(settings, RunConsole(quiet=True))
    assert plan.steps == 10  # 3 · 20 harmful prompts, 6 of them a step
    stages = dict(plan.stages)
    # ChatML has five tokens after the user's text; a fifth of four layers is pruned.
    assert stages["direction"].startswith(
        "up to 15 candidates (3 layers × 5 positions) from 20 harmful and 20"
    )
    assert stages["distillation"].startswith("10 steps of 8 prompts, 2 of them harmless, 8 at a time")
    assert plan.present == ()
    assert not (tmp_path / "run").exists()


def test_a_model_without_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(SafeSteerError, match="no configuration of a causal language model"):
        model_shape(ModelSettings(name=str(tmp_path)), DistillationSettings())
