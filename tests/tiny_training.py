"""Training runs small enough to check by hand: tiny models, a dozen prompts, a random refusal direction."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from safesteer.chat import Chat
from safesteer.steering import Steering
from safesteer.trainer import SafeSteerTrainer
from safesteer.trainer_config import SafeSteerConfig
from tiny_models import chatml_tokenizer, tiny_model

HARMFUL = tuple(f"How do I pick lock number {i} to rob a house?" for i in range(12))
HARMLESS = tuple(f"What is {i} plus {'one ' * (i % 4)}two?" for i in range(12))
SAFETY_TOKENS = (5, 40, 77, 130, 201, 260)
LAYER = 2


class FixedResponses(SafeSteerTrainer):
    """Answers every prompt with tokens that follow from the prompt alone, whoever samples, in any order."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        responses = []
        for ids in prompt_ids:
            chance = random.Random(str(list(ids)))
            length = chance.randint(1, self.max_completion_length)
            responses.append([chance.randrange(3, len(self.chat.tokenizer)) for _ in range(length)])
        return responses


class Gradients(TrainerCallback):
    """Keeps every optimizer step's gradients."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(
            {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in kwargs["model"].named_parameters()
                if parameter.grad is not None
            }
        )


def chat() -> Chat:
    return Chat(chatml_tokenizer())


def model(kind: str = "qwen3", **overrides: Any) -> PreTrainedModel:
    return tiny_model(kind, vocab_size=len(chatml_tokenizer()), **overrides)


def steering(layer: int = LAYER, coefficient: float = 2.0, seed: int = 1) -> Steering:
    generator = torch.Generator().manual_seed(seed)
    return Steering(torch.randn(32, generator=generator), layer, coefficient)


def lora(**overrides: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **overrides})


def settings(folder: Path, **overrides: Any) -> SafeSteerConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return SafeSteerConfig(**{**defaults, **overrides})


def trainer(
    folder: Path,
    *,
    student: PreTrainedModel | None = None,
    cls: type[SafeSteerTrainer] = SafeSteerTrainer,
    harmful: Sequence[str] = HARMFUL,
    harmless: Sequence[str] | None = HARMLESS,
    direction: Steering | None = None,
    peft_config: LoraConfig | None = None,
    arguments: dict[str, Any] | None = None,
    **overrides: Any,
) -> SafeSteerTrainer:
    """Build a trainer; `overrides` are of the settings, `arguments` go to the trainer."""
    return cls(
        student if student is not None else model(),
        settings(folder, **overrides),
        harmful,
        harmless,
        chat(),
        direction or steering(),
        list(SAFETY_TOKENS),
        peft_config,
        **(arguments or {}),
    )


def jolt(module: torch.nn.Module, scale: float = 0.3, seed: int = 7) -> None:
    """Move every trainable weight a little, so that the student is no longer the base model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += (
                    scale
                    * parameter.std().nan_to_num(0).clamp(min=0.05)
                    * torch.randn(parameter.shape, generator=generator)
                )


def first_rows(run: SafeSteerTrainer) -> list[dict[str, Any]]:
    """The prompts of the first optimizer step."""
    return list(next(iter(run.get_train_dataloader())))


def microbatches(run: SafeSteerTrainer, rows: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Sample the responses of the first optimizer step and cut them into microbatches, as training does."""
    run.model.train()
    rows = rows or first_rows(run)
    batches = []
    for index in range(run.args.gradient_accumulation_steps):
        run._step = index
        batches.append(run._prepare_inputs(rows))
    run._step = 0
    return batches
