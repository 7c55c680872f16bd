"""Settings that are refused, settings that are filled in, and what must fit together."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import HfArgumentParser, get_scheduler

import tiny_training as tiny
from safesteer.errors import SafeSteerError
from safesteer.steering import Steering
from safesteer.trainer import SafeSteerTrainer
from safesteer.trainer_config import SafeSteerConfig


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"anchor_fraction": 1.0}, "anchor_fraction"),
        ({"beta": 1.5}, "beta"),
        ({"skip_tokens": -1}, "skip_tokens"),
        ({"first_tokens": 3, "skip_tokens": 3}, "first_tokens must be above"),
        ({"first_tokens": 0}, "first_tokens"),
        ({"teacher_top_k": 0}, "teacher_top_k"),
        ({"max_prompt_length": 0}, "max_prompt_length"),
        ({"ema_rate": 0.0}, "ema_rate"),
        ({"refresh_steps": 2}, "needs teacher ema"),
        ({"shuffle_dataset": True}, "shuffle_dataset"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(SafeSteerError, match=told):
        tiny.settings(tmp_path, **wrong)


def test_defaults_are_the_papers_step(tmp_path: Path) -> None:
    args = SafeSteerConfig(output_dir=str(tmp_path), use_cpu=True)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert (args.max_completion_length, args.max_prompt_length, args.temperature) == (512, 512, 1.0)
    assert (args.max_grad_norm, args.beta, args.reduction, args.vocabulary) == (
        1.0,
        1.0,
        "response",
        "safety_tokens",
    )
    assert not args.bf16
    assert not args.fp16
    assert not args.gradient_checkpointing
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(100), 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[5] == pytest.approx(0.5)
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("warmup", "steps", "wanted"),
    [(0.1, 1, 0), (0.1, 7, 0), (0.1, 10, 1), (0.1, 25, 2), (0.0, 50, 0), (3, 50, 3)],
)
def test_the_warm_up_is_the_whole_steps_of_its_share(
    tmp_path: Path, warmup: float, steps: int, wanted: int
) -> None:
    args = SafeSteerConfig(output_dir=str(tmp_path), use_cpu=True, warmup_steps=warmup)
    assert args.get_warmup_steps(steps) == wanted


def test_a_training_of_one_step_trains(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, peft_config=tiny.lora(), max_steps=1)
    run.train()
    factors = [
        value for name, value in run.model.named_parameters() if "lora_B" in name and value.requires_grad
    ]
    assert factors
    assert all(factor.any() for factor in factors)


def test_every_setting_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(SafeSteerConfig).parse_args_into_dataclasses(["--help"])
    text = capsys.readouterr().out
    own = [field for field in fields(SafeSteerConfig) if field.name in SafeSteerConfig.__annotations__]
    assert len(own) > 20
    for field in own:
        assert f"--{field.name}" in text
        assert field.metadata["help"]
    (args,) = HfArgumentParser(SafeSteerConfig).parse_args_into_dataclasses(
        [
            "--output_dir",
            "x",
            "--use_cpu",
            "--teacher",
            "ema",
            "--first_tokens",
            "7",
            "--train_layers",
            "from_steered",
        ]
    )
    assert (args.teacher, args.first_tokens, args.train_layers) == ("ema", 7, "from_steered")


@pytest.mark.parametrize(
    ("settings", "arguments", "told"),
    [
        ({"teacher": "adapter_off"}, {}, "needs an adapter"),
        ({}, {"direction": None}, "no refusal direction"),
        (
            {"teacher": "system_prompt", "train_layers": "from_steered"},
            {"direction": None},
            "no refusal direction",
        ),
        ({}, {"direction": Steering(torch.ones(16), 1)}, "32 wide"),
        ({}, {"safety_tokens": []}, "0 safety tokens"),
        ({}, {"safety_tokens": None}, "0 safety tokens"),
        ({}, {"safety_tokens": [3, 3]}, "distinct"),
        ({}, {"safety_tokens": [3, 10_000]}, "vocabulary size"),
        ({"anchor_fraction": 0.5}, {"harmless": None}, "harmless prompts"),
        ({}, {"harmful": []}, "no harmful prompts"),
        ({"probe_steps": 2}, {}, "no probe prompts"),
        ({"teacher": "ema", "refresh_steps": 2}, {}, "refresh"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, settings: dict[str, Any], arguments: dict[str, Any], told: str
) -> None:
    values: dict[str, Any] = {
        "model": tiny.model(),
        "args": tiny.settings(tmp_path, **settings),
        "harmful": tiny.HARMFUL,
        "harmless": tiny.HARMLESS,
        "chat": tiny.chat(),
        "direction": tiny.steering(),
        "safety_tokens": tiny.SAFETY_TOKENS,
    }
    with pytest.raises(SafeSteerError, match=told):
        SafeSteerTrainer(**(values | arguments))


def test_quantized_weights_have_limits(tmp_path: Path) -> None:
    """QLoRA cannot be sampled from by vLLM, copied, or trained without an adapter."""
    quantized = tiny.model()
    quantized.is_loaded_in_4bit = True
    for settings, adapter, told in (
        ({"use_vllm": True}, tiny.lora(), "QLoRA.*merged.*turn off use_vllm"),
        ({}, None, "cannot be trained"),
        ({"teacher": "frozen_copy"}, tiny.lora(), "cannot be copied"),
        ({"teacher": "ema"}, tiny.lora(), "cannot be copied"),
    ):
        with pytest.raises(SafeSteerError, match=told):
            tiny.trainer(tmp_path, student=quantized, peft_config=adapter, **settings)


def test_adapters_that_cannot_be_restricted_are_refused(tmp_path: Path) -> None:
    adapted: Any = get_peft_model(tiny.model(), tiny.lora())
    for student, config, told in (
        (adapted, None, "already has"),
        (tiny.model(), PromptTuningConfig(num_virtual_tokens=2), "cannot restrict a Prompt"),
        (tiny.model(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1]), "leave none"),
    ):
        with pytest.raises(SafeSteerError, match=told):
            tiny.trainer(tmp_path, student=student, peft_config=config, train_layers="from_steered")


def test_the_callers_settings_are_left_alone(tmp_path: Path) -> None:
    args = tiny.settings(tmp_path, num_train_epochs=2)
    run = SafeSteerTrainer(
        tiny.model(), args, tiny.HARMFUL, None, tiny.chat(), tiny.steering(), tiny.SAFETY_TOKENS
    )
    assert run.args.max_steps == 6
    assert args.max_steps == -1
