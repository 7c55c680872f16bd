"""Every setting of a run: nested frozen dataclasses.

A setting is one field with a type, a default and a `help` text. From that follow the YAML recipes
(`recipes.py`), the command-line flags, `--help`, the run's `config.yaml` and the stages' fingerprints.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from safesteer.choices import (
    SAFETY_SYSTEM_PROMPT,
    Reduction,
    Support,
    TeacherCopy,
    TeacherKind,
    Thinking,
    TrainLayers,
    Vocabulary,
    setting,
)
from safesteer.direction_settings import DirectionSettings
from safesteer.errors import SafeSteerError
from safesteer.safety_token_settings import SafetyTokenSettings


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it is talked to."""

    name: str = setting(
        "", "Hub id or folder of the chat model (or of a LoRA adapter).", flag="model", path=True
    )
    revision: str | None = setting(None, "Branch, tag or commit of the hub model.")
    dtype: str = setting(
        "auto", "Weights' dtype: float32, bfloat16, float16, or auto (the checkpoint's on a GPU)."
    )
    device: str | None = setting(None, "Device: cpu, cuda or mps; by default the best there is.")
    attn_implementation: str | None = setting(None, "Attention kernel: eager, sdpa, flash_attention_2, …")
    trust_remote_code: bool = setting(False, "Run Python code that the model's repository ships.")
    layer_path: str | None = setting(
        None, "Where the decoder layers are, e.g. model.layers, if they are not found."
    )
    chat_template: str | None = setting(None, "Jinja file to use as the chat template.", path=True)
    system_prompt: str | None = setting(None, "System prompt put before every prompt.")
    thinking: Thinking = setting(
        "off", "For models that can think: off closes the think block before the answer."
    )
    template_kwargs: Mapping[str, Any] = setting({}, "More variables for the chat template, as JSON.")
    drop_date_lines: bool = setting(
        True, "Leave out the date lines of Llama-3.1 and later, which change daily."
    )

    def __post_init__(self) -> None:
        """Refuse a device that the trainer would not use.

        Raises:
            SafeSteerError: Naming the remedy.
        """
        if self.device not in (None, "cpu", "cuda", "cuda:0", "mps"):
            raise SafeSteerError(
                f"--device is {self.device!r}; give cpu, cuda or mps, and choose among several GPUs with the "
                "environment variable CUDA_VISIBLE_DEVICES."
            )


@dataclass(frozen=True)
class PromptSettings:
    """Which prompts."""

    harmful: str = setting(
        "", "Harmful prompts: .json, .jsonl, .csv, .parquet, .txt or a hub dataset.", path=True
    )
    harmless: str | None = setting(
        None,
        "Harmless prompts, for the direction, the safety tokens and the anchor; by default the bundled ones.",
        path=True,
    )
    direction_harmful: str | None = setting(
        None,
        "Harmful prompts for the direction alone, when they should differ from those trained on.",
        path=True,
    )
    prompt_field: str | None = setting(
        None, "Column or key that holds the prompt; found by itself when it is usual."
    )
    split: str = setting("train", "Split to take of a hub dataset.", flag="prompt-split")
    harmful_count: int | None = setting(None, "How many harmful prompts to draw; by default all.")
    harmless_count: int | None = setting(None, "How many harmless prompts to draw; by default all.")
    max_characters: int = setting(4000, "Prompts longer than this are dropped, and counted.")


@dataclass(frozen=True)
class DistillationSettings:
    """How the student learns from the teacher (method §4)."""

    lora: bool = setting(
        True,
        "Train a LoRA adapter (the teacher shares the weights) or all weights (a second copy teaches).",
    )
    lora_rank: int = setting(32, "Rank of the LoRA adapter.")
    lora_alpha: int = setting(64, "Scale of the LoRA adapter: its update is multiplied by alpha/rank.")
    lora_targets: tuple[str, ...] = setting(("all-linear",), "Names of the modules that get an adapter.")
    teacher: TeacherKind = setting(
        "auto", "Where the teacher's weights are: auto takes adapter_off with LoRA, frozen_copy without."
    )
    teacher_copy: TeacherCopy = setting(
        "same",
        "Where a second copy of the weights keeps its layers: like the student's (same), in host memory, one "
        "at a time on the device (cpu), or with their linear maps in eight bits (int8).",
    )
    vocabulary: Vocabulary = setting("safety_tokens", "Tokens S that the loss looks at.")
    support: Support = setting(
        "tail",
        "What becomes of the tokens outside S: truncated drops them (the paper), tail makes them one bucket, "
        "generalized corrects each term for its mass, renormalized looks inside S alone.",
    )
    teacher_system_prompt: str = setting(SAFETY_SYSTEM_PROMPT, "System prompt of the teacher system_prompt.")
    beta: float = setting(
        1.0, "Divergence: 1 reverse KL(student‖teacher), 0 forward KL, between generalized JSD."
    )
    teacher_top_k: int = setting(50, "Tokens per position of the vocabulary teacher_top_k.")
    reduction: Reduction = setting(
        "response", "Mean over each response's tokens first (the paper), or over all tokens alike."
    )
    first_tokens: int | None = setting(
        None, "Sample, and take the loss on, the first so many response tokens only."
    )
    skip_tokens: int = setting(0, "Leave out the first so many response tokens.")
    anchor_fraction: float = setting(
        0.5, "Share of each batch that is harmless, with the unsteered base as teacher."
    )
    train_layers: TrainLayers = setting(
        "auto",
        "Which layers are trained; from_steered leaves those below the steered one alone, auto does so where "
        "the teacher is steered at one layer throughout.",
    )
    ema_rate: float = setting(0.01, "Teacher ema: share of the student taken over after each step.")
    refresh_steps: int = setting(
        0, "Teacher ema: find direction and tokens anew every so many steps; 0 never."
    )
    learning_rate: float | None = setting(
        None, "Peak learning rate; by default 1e-4 with LoRA, 1e-5 without."
    )
    steps: int | None = setting(None, "Optimizer steps; by default as many as the epochs make.")
    epochs: float = setting(1.0, "Passes over the harmful prompts, unless steps are given.")
    batch_size: int = setting(32, "Prompts per optimizer step, over all devices.")
    micro_batch_size: int | Literal["auto"] = setting(
        "auto",
        "Prompts per forward and backward pass on one device; auto takes as many as the memory estimate lets "
        "it. Halved when memory runs out.",
    )
    max_prompt_length: int = setting(
        512, "Tokens of a rendered prompt; longer user texts are cut at their end."
    )
    max_completion_length: int = setting(512, "Tokens of a sampled response.")
    temperature: float = setting(1.0, "Sampling temperature of the student's responses, and of the loss.")
    schedule: str = setting("cosine", "Learning-rate schedule, by transformers' names.")
    warmup_ratio: float = setting(0.1, "Share of the steps over which the learning rate rises.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    max_grad_norm: float = setting(1.0, "Gradients longer than this are shortened to it.")
    master_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Dtype of fully trained weights: bfloat16 halves their memory, but rounds away steps of 1e-6.",
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass, to save memory."
    )
    divergence_chunk_size: int | None = setting(None, "Response tokens whose logits exist at a time.")
    use_vllm: bool = setting(False, "Sample the student's responses with vLLM.")
    probe_steps: int = setting(
        10, "Measure the refusal rate on a few probe prompts every so many steps; 0 never."
    )
    probe_size: int = setting(16, "Probe prompts of each kind, harmful and harmless.")
    probe_tokens: int = setting(32, "Tokens of a probe's greedy response.")
    checkpoint_steps: int = setting(10, "Save a checkpoint to continue from every so many steps; 0 never.")
    trainer_args: Mapping[str, Any] = setting(
        {}, "More arguments for SafeSteerConfig (so TRL's and transformers'), as JSON."
    )

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the default for LoRA or full fine-tuning has been filled in."""
        return self.learning_rate if self.learning_rate is not None else (1e-4 if self.lora else 1e-5)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide what comes out of the training, for its fingerprint."""
        return {
            entry.name: _plain(getattr(self, entry.name))
            for entry in dataclasses.fields(self)
            if entry.name not in _WITHOUT_EFFECT
        }

    @property
    def sampled_tokens(self) -> int:
        """Longest response that is sampled: no tokens after those that count."""
        return min(self.max_completion_length, self.first_tokens or self.max_completion_length)

    def __post_init__(self) -> None:
        """Refuse what no training can be made of.

        Raises:
            SafeSteerError: Naming the setting and its bounds.
        """
        if self.micro_batch_size != "auto":
            _positive(self, "micro_batch_size")
        _positive(self, "lora_rank", "lora_alpha", "batch_size", "max_prompt_length")
        _positive(self, "max_completion_length", "epochs", "temperature", "max_grad_norm", "probe_size")
        if self.steps is not None and self.steps < 1:
            raise SafeSteerError(
                f"--steps is {self.steps}; give at least 1, or leave it out to train whole epochs."
            )
        if not self.peak_learning_rate > 0:
            raise SafeSteerError(f"--learning-rate is {self.learning_rate}; give a number above 0.")
        if not 0 <= self.warmup_ratio < 1:
            raise SafeSteerError(
                f"--warmup-ratio is {self.warmup_ratio}; give a share of the steps, from 0 to below 1."
            )
        if not self.lora and self.teacher == "adapter_off":
            raise SafeSteerError(
                "--teacher adapter_off needs a LoRA adapter to switch off; leave --full out or take "
                "--teacher frozen_copy."
            )


@dataclass(frozen=True)
class RunSettings:
    """Where the run is kept, and what is common to its stages."""

    output: str = setting("", "Folder of the run; a run that is there continues.")
    seed: int = setting(42, "Seed of every stage, unless the stage has its own.")
    report_to: tuple[str, ...] = setting((), "Trackers for the training: tensorboard, wandb, trackio, …")
    logging_steps: int = setting(1, "Log every so many steps.")


@dataclass(frozen=True)
class Settings:
    """All settings of a run; one attribute per section of a recipe."""

    model: ModelSettings = field(default_factory=ModelSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    direction: DirectionSettings = field(default_factory=DirectionSettings)
    safety_tokens: SafetyTokenSettings = field(default_factory=SafetyTokenSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def layer(self) -> dict[str, dict[str, Any]]:
        """Return the settings as plain YAML and JSON values, by section and field."""
        return {
            section: {
                entry.name: _plain(getattr(getattr(self, section), entry.name))
                for entry in dataclasses.fields(kind)
            }
            for section, kind in SECTIONS.items()
        }

    def yaml(self) -> str:
        """Return the settings as a recipe that reproduces them, wherever it is kept."""
        layer = self.layer()
        for section, kind in SECTIONS.items():
            for entry in dataclasses.fields(kind):
                value = layer[section][entry.name]
                if entry.metadata.get("path") and value and value.startswith("."):
                    layer[section][entry.name] = str(Path(value).resolve())
        return str(yaml.safe_dump(layer, sort_keys=False, allow_unicode=True, width=110))


SECTIONS: dict[str, type[Any]] = {
    "model": ModelSettings,
    "prompts": PromptSettings,
    "direction": DirectionSettings,
    "safety_tokens": SafetyTokenSettings,
    "distillation": DistillationSettings,
    "run": RunSettings,
}
"""The sections of a recipe, in the order of the data's way through the stages."""

# What only costs more or less memory, time or ink, so that a training may continue after a change of it.
_WITHOUT_EFFECT = {
    "micro_batch_size",
    "divergence_chunk_size",
    "gradient_checkpointing",
    "checkpoint_steps",
    "probe_steps",
    "probe_size",
    "probe_tokens",
}


def _positive(settings: DistillationSettings, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            flag = name.replace("_", "-")
            raise SafeSteerError(f"--{flag} is {getattr(settings, name)}; give a number above 0.")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
