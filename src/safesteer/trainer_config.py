"""Settings of the distillation stage, `SafeSteerConfig`."""

import math
from dataclasses import dataclass, field
from typing import get_args

import torch
from trl import DistillationConfig

from safesteer.choices import (
    SAFETY_SYSTEM_PROMPT,
    Reduction,
    Support,
    TeacherCopy,
    TeacherKind,
    TrainLayers,
    Vocabulary,
)
from safesteer.errors import SafeSteerError


@dataclass
class SafeSteerConfig(DistillationConfig):  # type: ignore[misc, unused-ignore]
    """Settings of `SafeSteerTrainer`: those of `trl.DistillationConfig` and its own (method §4, §6).

    An optimizer step uses `per_device_train_batch_size · processes · gradient_accumulation_steps` prompts (32
    by default on one process). `num_train_epochs` counts passes over the harmful prompts; `max_steps`
    overrides it. `temperature` is both the sampling temperature and that of the two distributions compared.
    """

    learning_rate: float = field(
        default=1e-5,
        metadata={"help": "Peak learning rate of AdamW; about 1e-5 for full fine-tuning, 1e-4 for LoRA."},
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the harmful prompts."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Prompts per process and forward pass."}
    )
    gradient_accumulation_steps: int = field(
        default=4,
        metadata={"help": "Forward passes per optimizer step; responses are sampled once for all of them."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up: steps, or below 1 the share of all steps."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass: less memory, about 20%% slower. Off by "
            "default; newer transformers call it activation_checkpointing."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 mixed precision; by default on where the GPU has it and fp16 is off."},
    )
    shuffle_dataset: bool | None = field(
        default=False,
        metadata={"help": "Must stay off: the prompts are already laid out in optimizer steps."},
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many optimizer steps."})
    max_prompt_length: int = field(
        default=512,
        metadata={"help": "Prompts are cut to this many tokens, taken from the end of the user's text."},
    )

    teacher: TeacherKind = field(
        default="auto",
        metadata={
            "help": "Who teaches: the model itself with its adapter off (adapter_off), a frozen second copy "
            "(frozen_copy), a copy that follows the student (ema), or the unsteered model with a safety "
            "system prompt (system_prompt). auto: adapter_off with LoRA, else frozen_copy."
        },
    )
    teacher_copy: TeacherCopy = field(
        default="same",
        metadata={
            "help": "Where a teacher that is a second copy of the weights keeps its decoder layers: like the "
            "student's (same), in host memory, one at a time on the device (cpu), or with their linear maps "
            "in eight bits (int8)."
        },
    )
    vocabulary: Vocabulary = field(
        default="safety_tokens",
        metadata={
            "help": "Which tokens S the divergence looks at: safety_tokens, the teacher's most probable "
            "ones at each position (teacher_top_k), or all (full)."
        },
    )
    support: Support = field(
        default="tail",
        metadata={
            "help": "How the divergence is confined to S: the paper's sum over S (truncated), S plus one "
            "bucket for all other tokens (tail), the generalized KL on S (generalized), or renormalized "
            "inside S (renormalized)."
        },
    )
    teacher_top_k: int = field(default=50, metadata={"help": "Size of S for vocabulary teacher_top_k."})
    reduction: Reduction = field(
        default="response",
        metadata={"help": "Average over each response's tokens and then over responses, or over all tokens."},
    )
    first_tokens: int | None = field(
        default=None,
        metadata={"help": "Only the first so many tokens of each response count, and no more are sampled."},
    )
    skip_tokens: int = field(
        default=0, metadata={"help": "The first so many tokens of each response do not count."}
    )
    anchor_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of each step that is harmless prompts, taught by the unsteered base model."},
    )
    train_layers: TrainLayers = field(
        default="auto",
        metadata={
            "help": "all, or from_steered: only the layers from the steered one on (with the final norm, "
            "and the head unless it is tied to the embeddings, in full fine-tuning). auto: from_steered where the "
            "teacher is steered at one layer throughout and the adapter is not there already."
        },
    )
    share_lower_layers: bool = field(
        default=True,
        metadata={"help": "With from_steered: compute the layers below once for teacher and student."},
    )
    ema_rate: float = field(
        default=0.01, metadata={"help": "Teacher ema: share of the student taken over a step."}
    )
    refresh_steps: int = field(
        default=0,
        metadata={"help": "Teacher ema: find direction and safety tokens anew every so many steps; 0 never."},
    )
    teacher_system_prompt: str = field(
        default=SAFETY_SYSTEM_PROMPT, metadata={"help": "The system prompt of teacher system_prompt."}
    )
    divergence_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Positions whose logits exist at a time; less is less memory. By default chosen."},
    )
    probe_steps: int = field(
        default=0,
        metadata={"help": "Measure refusal rates on the probe prompts every so many steps; 0 never."},
    )
    probe_tokens: int = field(
        default=32, metadata={"help": "Length of the probe's greedy responses, in tokens."}
    )

    def __post_init__(self) -> None:
        """Check the settings and settle bf16 by what the hardware has."""
        if self.bf16 is None:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = not self.fp16 and gpu and torch.cuda.is_bf16_supported()
        for rule, broken in (
            (
                "shuffle_dataset must stay False, because the prompts are laid out in steps",
                self.shuffle_dataset,
            ),
            ("beta must be between 0 (forward KL) and 1 (reverse KL)", not 0.0 <= self.beta <= 1.0),
            ("anchor_fraction must be at least 0 and below 1", not 0.0 <= self.anchor_fraction < 1.0),
            ("ema_rate must be above 0 and at most 1", not 0.0 < self.ema_rate <= 1.0),
            ("skip_tokens must be at least 0", self.skip_tokens < 0),
            (
                "first_tokens must be above skip_tokens",
                (self.first_tokens or self.skip_tokens + 1) <= self.skip_tokens,
            ),
            ("first_tokens must be at least 1", self.first_tokens is not None and self.first_tokens < 1),
            ("teacher_top_k must be at least 1", self.teacher_top_k < 1),
            (
                "teacher_copy must be same, cpu or int8",
                self.teacher_copy not in get_args(TeacherCopy),
            ),
            (
                "teacher_copy must be same for teacher ema, whose copy is updated after every step",
                self.teacher == "ema" and self.teacher_copy != "same",
            ),
            ("max_prompt_length must be at least 1", self.max_prompt_length < 1),
            (
                "skip_tokens must be below max_completion_length, or no token counts",
                self.skip_tokens >= self.max_completion_length,
            ),
            (
                "divergence_chunk_size must be at least 1",
                self.divergence_chunk_size is not None and self.divergence_chunk_size < 1,
            ),
            (
                "refresh_steps needs teacher ema, a frozen teacher's direction stays",
                self._refresh_without_ema(),
            ),
        ):
            if broken:
                raise SafeSteerError(f"{rule}; change the setting.")
        if self.first_tokens is not None:
            # Nothing that comes after the tokens that count has a part in the loss.
            longest: int = self.max_completion_length
            self.max_completion_length: int = min(longest, self.first_tokens)
        super().__post_init__()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Whole steps of warm-up that fit into the share `warmup_steps`.

        transformers rounds up, and gives the first step of any warm-up rate 0: a training of one step would train nothing.
        """
        if self.warmup_steps < 1:
            return math.floor(num_training_steps * self.warmup_steps)
        return int(self.warmup_steps)

    def _refresh_without_ema(self) -> bool:
        return self.refresh_steps > 0 and self.teacher != "ema"
