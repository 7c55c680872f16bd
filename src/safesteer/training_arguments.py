"""From a run's settings to the trainer's: `SafeSteerConfig` and the LoRA adapter."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from trl.import_utils import is_vllm_available

from safesteer.coercion import closest
from safesteer.errors import SafeSteerError, one_line
from safesteer.settings import DistillationSettings, Settings
from safesteer.trainer_config import SafeSteerConfig

# Fields of DistillationSettings that SafeSteerConfig has under the same name.
_SAME_NAMES = (
    "teacher",
    "teacher_copy",
    "teacher_system_prompt",
    "vocabulary",
    "support",
    "beta",
    "teacher_top_k",
    "reduction",
    "first_tokens",
    "skip_tokens",
    "anchor_fraction",
    "train_layers",
    "ema_rate",
    "refresh_steps",
    "max_prompt_length",
    "max_completion_length",
    "temperature",
    "weight_decay",
    "max_grad_norm",
    "divergence_chunk_size",
    "use_vllm",
    "probe_steps",
    "probe_tokens",
)
# The other processes of a distributed run wait while the first one finds direction and tokens.
_SECONDS_TO_WAIT = 6 * 3600

DEFAULT_MICRO_BATCH = 8
"""Prompts per pass where the memory does not tell: more of them are hardly faster without a GPU."""


def number_of_processes() -> int:
    """Return how many processes `accelerate launch` or `torchrun` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def micro_batches(settings: DistillationSettings, processes: int) -> tuple[int, int]:
    """Divide the prompts of an optimizer step over processes and passes.

    Returns:
        Prompts per pass on one process (the most that divide evenly, at most `micro_batch_size`; for auto
        at most `DEFAULT_MICRO_BATCH`; `memory_estimate.planned_micro_batch` finds a better one), and passes
        per step.

    Raises:
        SafeSteerError: If the prompts cannot be divided over the processes.
    """
    if settings.batch_size % processes:
        raise SafeSteerError(
            f"--batch-size is {settings.batch_size}, which {processes} processes cannot share evenly; "
            f"give a multiple of {processes}."
        )
    share = settings.batch_size // processes
    most = DEFAULT_MICRO_BATCH if settings.micro_batch_size == "auto" else settings.micro_batch_size
    size = next(size for size in range(min(most, share), 0, -1) if share % size == 0)
    return size, share // size


def memory_remedies(settings: DistillationSettings) -> str:
    """Say what makes a training need less memory, of what its settings have not done yet."""
    remedies = {
        "train a LoRA adapter instead of all weights (--lora)": not settings.lora,
        "add --gradient-checkpointing": not settings.gradient_checkpointing,
        f"lower --max-completion-length, which is {settings.max_completion_length}": settings.sampled_tokens
        > 1
        and settings.sampled_tokens == settings.max_completion_length,
        "keep the teacher in host memory (--teacher-copy cpu)": not settings.lora
        and settings.teacher != "ema"
        and settings.teacher_copy == "same",
        "let the teacher share the weights (--teacher adapter_off)": settings.lora
        and settings.teacher in ("frozen_copy", "ema"),
        "take a device with more memory": True,
    }
    *most, last = [text for text, helps in remedies.items() if helps]
    return f"{', '.join(most)}, or {last}"


def training_arguments(settings: Settings) -> SafeSteerConfig:
    """Build the trainer's settings.

    Raises:
        SafeSteerError: If a trainer argument does not exist or the trainer refuses a value.
    """
    distillation, run = settings.distillation, settings.run
    micro_batch, passes = micro_batches(distillation, number_of_processes())
    values: dict[str, Any] = {name: getattr(distillation, name) for name in _SAME_NAMES}
    values |= {
        "output_dir": str(Path(run.output) / "checkpoints"),
        "learning_rate": distillation.peak_learning_rate,
        "lr_scheduler_type": distillation.schedule,
        "warmup_steps": distillation.warmup_ratio,
        "num_train_epochs": distillation.epochs,
        "max_steps": distillation.steps or -1,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": passes,
        "save_strategy": "steps" if distillation.checkpoint_steps else "no",
        "save_steps": distillation.checkpoint_steps or 500,
        "save_total_limit": 1,
        "logging_steps": run.logging_steps,
        "report_to": list(run.report_to) or "none",
        "seed": run.seed,
        "use_cpu": settings.model.device == "cpu",
        # Float32 that was asked for means no mixed precision either.
        "bf16": False if settings.model.dtype == "float32" else None,
        "ddp_timeout": _SECONDS_TO_WAIT,
        "disable_tqdm": True,
        # None is off too, but without transformers' warning of the name it is about to change.
        "gradient_checkpointing": distillation.gradient_checkpointing or None,
    }
    _require_packages(settings)
    if not distillation.use_vllm:
        # A model that training has broken then answers at random instead of failing inside the sampler, and
        # the trainer stops at its loss, which it can tell from other failures.
        values["generation_kwargs"] = {"remove_invalid_values": True}
    known = {field.name for field in dataclasses.fields(SafeSteerConfig) if field.init}
    for name in distillation.trainer_args:
        if name not in known:
            raise SafeSteerError(
                f"--trainer-args: SafeSteerConfig has no {name!r}{closest(name, known)}; "
                "see TRL's DistillationConfig and transformers' TrainingArguments for what there is."
            )
    try:
        args = SafeSteerConfig(**(values | dict(distillation.trainer_args)))
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise SafeSteerError(
            f"the trainer refuses its settings: {one_line(error)}; change the setting."
        ) from error
    if args.world_size == 1 and args.n_gpu > 1:
        # One process uses one GPU: transformers would split batches over all by DataParallel, which hooks and
        # PEFT's adapter switch do not survive. `accelerate launch` is the way to use several.
        args._n_gpu = 1
    return args


def _require_packages(settings: Settings) -> None:
    """Refuse trackers and samplers that are not there before anything is computed."""
    installed = get_available_reporting_integrations()
    for tracker in settings.run.report_to:
        if tracker in ("all", "none"):
            continue
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise SafeSteerError(
                f"--report-to: there is no tracker {tracker!r}{closest(tracker, INTEGRATION_TO_CALLBACK)}; "
                f"transformers knows {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )
        if tracker not in installed:
            raise SafeSteerError(f"--report-to {tracker}: is not installed; run `pip install {tracker}`.")
    if settings.distillation.use_vllm and not is_vllm_available():
        raise SafeSteerError("--use-vllm: vLLM is not installed; run `pip install 'safesteer[vllm]'`.")


def require_lora_targets(model: nn.Module, settings: DistillationSettings) -> None:
    """Check that a model has every module that the adapter is to go to; PEFT is content with one of them.

    Raises:
        SafeSteerError: Naming the first that it lacks, or that is no linear map.
    """
    if not settings.lora or settings.lora_targets == ("all-linear",):
        return
    maps = [
        f".{name}"
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    for target in settings.lora_targets:
        if not any(path.endswith(f".{target}") for path in maps):
            near = closest(target, {path.rpartition(".")[2] for path in maps})
            raise SafeSteerError(
                f"--lora-targets: the model has no linear map {target!r}{near}; name those of its layers, or leave it "
                "out for all of them."
            )


def lora_config(settings: DistillationSettings, revision: str | None = None) -> LoraConfig | None:
    """Return the adapter to train, of a base model's `revision`; None when all weights are trained."""
    if not settings.lora:
        return None
    targets = settings.lora_targets
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
