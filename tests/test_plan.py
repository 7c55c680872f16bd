"""The dry run's numbers, against real models and closed forms."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, PreTrainedModel

from safesteer import memory_estimate
from safesteer.console import RunConsole
from safesteer.errors import SafeSteerError
from safesteer.memory_estimate import (
    ModelShape,
    estimate_memory,
    fitting_micro_batch,
    model_shape,
)
from safesteer.plan import Plan, make_plan
from safesteer.recipes import build_settings
from safesteer.settings import DistillationSettings, ModelSettings, Settings
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
    outside = (model.get_input_embeddings(), model.get_output_embeddings())
    norms = sum(w.numel() for name, w in model.named_parameters() if name.endswith(("model.norm.weight",)))
    norms += sum(w.numel() for name, w in model.named_parameters() if "final_layer_norm" in name)
    vocabulary = sum(weight.numel() for weight in {module.weight for module in outside})
    assert shape.layer_parameters == shape.parameters - vocabulary - norms
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
    layer_parameters=600,
    linear_parameters=500,
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
        # In host memory: 400 weights outside the layers stay, and of two layers both are there at a time.
        ("cuda", {"lora": False, "teacher_copy": "cpu"}, (4000, 4000, 0, 4000, 8000)),
        ("cuda", {"lora": False, "teacher_copy": "int8"}, (4000, 4 * 500 + 500, 0, 4000, 8000)),
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

    tokens, logits = 88 + 512, 2 * 4 * 100
    layer = 16 * (4 * 2 + 8) + (2 * 16 + 2 * 8 + 4 * 40) * 2
    assert activations(micro_batch_size=1) == 2 * layer * tokens + logits
    assert activations(micro_batch_size=4) == 4 * 2 * layer * tokens + logits
    assert (
        activations(micro_batch_size=1, gradient_checkpointing=True) == (layer + 2 * 16 * 2) * tokens + logits
    )


def test_a_teacher_in_host_memory_leaves_two_of_its_layers_on_the_device() -> None:
    shape = dataclasses.replace(SHAPE, layers=6)
    distillation = DistillationSettings(lora=False, teacher_copy="cpu")
    estimate = estimate_memory(shape, ModelSettings(device="cuda"), distillation, prompt_tokens=10)
    assert estimate.teacher_copy == 4 * (400 + 2 * 100)
    on_cpu = estimate_memory(shape, ModelSettings(device="cpu"), distillation, prompt_tokens=10)
    assert on_cpu.teacher_copy == on_cpu.weights, "host memory is the device's own"


def _with_memory(monkeypatch: pytest.MonkeyPatch, available: int | None) -> None:
    """Tell of a device with so much memory, which this machine need not have."""
    monkeypatch.setattr(memory_estimate, "_available", lambda device: available)


def _needed(micro_batch: int, **settings: Any) -> float:
    """By hand: how much memory a device must have for a LoRA training of SHAPE, 85 % of it being used."""
    tokens = micro_batch * (88 + 512)
    layer = 16 * (4 * 2 + 8) + (2 * 16 + 2 * 8 + 4 * 40) * 2
    return (2000 + 4 * 4 * 28 + 2 * layer * tokens + 2 * 4 * 100) / 0.85


@pytest.mark.parametrize(
    ("device", "batch", "processes", "available", "wanted"),
    [
        ("cuda", 32, 1, _needed(32) + 1, 32),
        ("cuda", 32, 1, _needed(32) - 1, 16),
        ("cuda", 32, 1, _needed(2) + 1, 2),
        ("cuda", 32, 1, _needed(1) - 1, None),
        ("cuda", 32, 4, _needed(32) + 1, 8),  # of each device's share
        ("cuda", 12, 1, _needed(5) + 1, 4),  # 5 would not divide the step
        ("cuda", 32, 1, None, 8),
        ("cpu", 32, 1, 1e12, 8),
        ("cpu", 6, 1, 1e12, 6),
        ("mps", 32, 1, None, 8),
    ],
)
def test_auto_takes_the_largest_micro_batch_that_fits_into_85_percent(
    device: str,
    batch: int,
    processes: int,
    available: float | None,
    wanted: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _with_memory(monkeypatch, None if available is None else int(available))
    distillation = DistillationSettings(divergence_chunk_size=1, batch_size=batch)
    asked = (SHAPE, ModelSettings(name="x", device=device), distillation)
    assert fitting_micro_batch(*asked, prompt_tokens=88, processes=processes) == wanted
    estimate = estimate_memory(*asked, prompt_tokens=88, processes=processes)
    assert estimate.micro_batch == (wanted or 1)
    assert estimate.passes_fit == (wanted is not None)


@pytest.mark.parametrize(
    ("share", "settings", "told"),
    [
        (1.0, {}, None),
        # Of what one prompt at a time needs; the rollout of eight needs more.
        (0.99, {}, "Not even one prompt at a time is estimated to fit; add --gradient-checkpointing, lower"),
        (0.99, {"lora": False}, "train a LoRA adapter instead of all weights (--lora)"),
        (
            1.0,
            {"micro_batch_size": 8},
            "8 prompts at a time are estimated not to fit; give --micro-batch-size 1",
        ),
    ],
)
def test_a_plan_says_what_to_do_when_memory_is_short(
    share: float, settings: dict[str, Any], told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(**changed: Any) -> Plan:
        distillation = {"batch_size": 8, "max_completion_length": 64, "micro_batch_size": 1} | changed
        return make_plan(_run_settings(tmp_path, distillation), RunConsole(quiet=True))

    _write_inputs(tmp_path)
    one = plan(**({"lora": settings["lora"]} if "lora" in settings else {})).memory
    _with_memory(monkeypatch, int((one.lasting + one.activations) * share / 0.85) + 1)
    found = plan(**{"micro_batch_size": "auto"} | settings)
    assert found.memory.rollout_cache < found.memory.activations
    if told is None:
        assert found.advice is None
        assert "1 at a time (auto)" in dict(found.stages)["distillation"]
    else:
        assert found.advice is not None and told in found.advice


def test_a_plan_tells_a_rollout_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_inputs(tmp_path)
    settings = _run_settings(
        tmp_path, {"batch_size": 64, "anchor_fraction": 0, "gradient_checkpointing": True}
    )
    memory = make_plan(settings, RunConsole(quiet=True)).memory
    one = dataclasses.replace(settings.distillation, micro_batch_size=1)
    least = make_plan(dataclasses.replace(settings, distillation=one), RunConsole(quiet=True)).memory
    assert least.activations < memory.rollout_cache
    _with_memory(monkeypatch, int((least.lasting + least.activations) / 0.85) + 1)
    advice = make_plan(settings, RunConsole(quiet=True)).advice
    assert advice is not None and advice.startswith("The keys and values of 64 responses")


def _write_inputs(folder: Path) -> None:
    """Write a model's configuration, its tokenizer and twenty prompts of each kind."""
    _config_only(tiny_model("qwen3", vocab_size=len(chatml_tokenizer())), folder / "tiny")
    chatml_tokenizer().save_pretrained(folder / "tiny")
    for name in ("harmful", "harmless"):
        (folder / f"{name}.json").write_text(json.dumps([f"{name} prompt {i}" for i in range(20)]))


def _run_settings(folder: Path, distillation: dict[str, Any]) -> Settings:
    return build_settings(
        {
            "model": {"name": str(folder / "tiny"), "device": "cpu"},
            "prompts": {name: str(folder / f"{name}.json") for name in ("harmful", "harmless")},
            "distillation": distillation,
            "run": {"output": str(folder / "run")},
        }
    )


def test_a_plan_counts_steps_and_candidates_without_weights_and_writes_nothing(tmp_path: Path) -> None:
    _write_inputs(tmp_path)
    settings = _run_settings(tmp_path, {"batch_size": 8, "anchor_fraction": 0.25, "epochs": 3})
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
