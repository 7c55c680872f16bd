"""What a run would do and need, from the model's configuration alone: `--dry-run`."""

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from safesteer.console import RunConsole
from safesteer.divergence import LOGITS_PER_CHUNK
from safesteer.errors import SafeSteerError, one_line
from safesteer.loading import adapter_config, choose_device
from safesteer.settings import DistillationSettings, ModelSettings, Settings
from safesteer.training_arguments import lora_config, micro_batches, number_of_processes
from safesteer.training_data import anchors_per_step, number_of_steps
from safesteer.workspace import Workspace

_ARTIFACTS = ("direction.json", "safety_tokens.json", "checkpoints", "model")
_BYTES = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device during the distillation, the most memory-hungry stage.

    Attributes:
        weights: The student's, or with LoRA the base model's, which teacher and student share.
        teacher_copy: A second copy of the weights, when the teacher needs one.
        adapter: LoRA factors, float32.
        gradients: Of whatever is trained.
        optimizer: AdamW's two moments of whatever is trained.
        activations: Of one micro batch, forward and backward, and one chunk of the divergence's logits.
        rollout_cache: Keys and values while the step's responses are sampled.
        available: The device's memory; None if it cannot be told.
        device: What it was told for.
    """

    weights: int
    teacher_copy: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    rollout_cache: int
    available: int | None
    device: str

    @property
    def peak(self) -> int:
        """The most there is at a time: activations and the rollout's cache never live together."""
        lasting = self.weights + self.teacher_copy + self.adapter + self.gradients + self.optimizer
        return lasting + max(self.activations, self.rollout_cache)


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its memory and its candidates; read from a copy without weights."""

    parameters: int
    adapter_parameters: int
    layers: int
    hidden_size: int
    intermediate_size: int
    query_width: int
    key_value_width: int
    vocabulary: int
    dtype: torch.dtype


def model_shape(settings: ModelSettings, distillation: DistillationSettings) -> ModelShape:
    """Read a model's shape from its configuration, loading no weights.

    Args:
        settings: Which model.
        distillation: For the adapter.

    Raises:
        SafeSteerError: If there is no such model or it is no causal language model.
    """
    adapter = adapter_config(settings.name, settings.revision)
    name, revision = settings.name, settings.revision
    if adapter is not None:
        name, revision = adapter.base_model_name_or_path, adapter.revision
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=settings.trust_remote_code
        )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=settings.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SafeSteerError(
            f"{name}: has no configuration of a causal language model ({one_line(error)}); "
            "check the name and the revision."
        ) from error
    text: Any = config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    parameters = sum(weight.numel() for weight in model.parameters())
    adapter_parameters = _adapter_parameters(model, distillation)
    return ModelShape(
        parameters=parameters,
        adapter_parameters=adapter_parameters,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query_width=text.num_attention_heads * head_width,
        key_value_width=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_width,
        vocabulary=text.vocab_size,
        dtype=getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.float32,
    )


def estimate_memory(
    shape: ModelShape,
    model: ModelSettings,
    distillation: DistillationSettings,
    *,
    prompt_tokens: int,
    processes: int = 1,
) -> MemoryEstimate:
    """Estimate the memory each device needs, every device holding all of the model (data parallel).

    Weights, gradients, optimizer and cache are counted exactly; activations by the tensors that a gated-MLP
    transformer keeps for its backward pass, per token: `4b+8` bytes × H for the two norms and residuals, `b`
    for each query, key, value, attention output and four MLP intermediates, with `b` the bytes of the
    computing dtype. The CUDA context and fragmentation (about a GiB) come on top.

    Args:
        shape: Of the model.
        model: For dtype and device.
        distillation: For what is trained, and how much at a time.
        prompt_tokens: Longest rendered prompt.
        processes: Devices in the run.
    """
    # A device that this machine lacks may be planned for.
    device = torch.device(model.device) if model.device else choose_device(None)
    gpu = device.type == "cuda"
    stored = _stored_dtype(shape, model, gpu)
    trained_bytes = 4 if distillation.lora or distillation.master_dtype == "float32" else 2
    adapter = 4 * shape.adapter_parameters
    weights = shape.parameters * (_BYTES[stored] if distillation.lora else trained_bytes)
    trained = adapter if distillation.lora else shape.parameters * trained_bytes
    copied = distillation.teacher in ("frozen_copy", "ema") or not distillation.lora
    computing = 2 if gpu or stored != torch.float32 else 4
    tokens = prompt_tokens + distillation.max_completion_length
    micro_batch = min(distillation.micro_batch_size, -(-distillation.batch_size // processes))
    rollout_batch = -(-distillation.batch_size // processes)
    return MemoryEstimate(
        weights=weights,
        teacher_copy=weights if copied else 0,
        adapter=adapter,
        gradients=trained,
        optimizer=2 * trained,
        activations=_activations(shape, distillation, micro_batch * tokens, computing),
        rollout_cache=2 * shape.layers * shape.key_value_width * computing * rollout_batch * tokens,
        available=_available(device),
        device=_device_name(device),
    )


@dataclass(frozen=True)
class Plan:
    """What `align` would do.

    Attributes:
        stages: Name of each stage, and what it would compute.
        steps: Optimizer steps.
        memory: Of the distillation, on each device.
        present: Artifacts that are in the run's folder already; each is kept if its inputs turn out
            unchanged.
    """

    stages: tuple[tuple[str, str], ...]
    steps: int
    memory: MemoryEstimate
    present: tuple[str, ...]


def make_plan(settings: Settings, console: RunConsole) -> Plan:
    """Say what a run would do, from prompts, tokenizer and configuration but no weights; nothing is written.

    Args:
        settings: Of the run.
        console: For what is noted about the prompts.

    Raises:
        SafeSteerError: For everything that would stop the run before the model is loaded.
    """
    work = Workspace(settings, console)
    direction, tokens, distillation = settings.direction, settings.safety_tokens, settings.distillation
    processes = number_of_processes()
    shape = model_shape(settings.model, distillation)
    steps = distillation.steps or number_of_steps(
        len(work.harmful.prompts), distillation.batch_size, distillation.anchor_fraction, distillation.epochs
    )
    prompts = (*work.harmful.prompts, *work.harmless.prompts)
    longest = max(map(len, work.chat.encode(prompts, max_length=distillation.max_prompt_length)))
    positions = len(work.chat.post_instruction_ids)
    layers = int(direction.prune_layers_above * shape.layers)
    micro_batch, _ = micro_batches(distillation, processes)
    anchors = anchors_per_step(distillation.batch_size, distillation.anchor_fraction)
    trained = "a LoRA adapter" if distillation.lora else "all weights"
    on = f" on {processes} devices" if processes > 1 else ""
    return Plan(
        stages=(
            (
                "direction",
                f"up to {layers * positions} candidates ({layers} layers × {positions} positions) from "
                f"{len(work.direction_harmful)} harmful and {len(work.harmless)} harmless prompts",
            ),
            (
                "safety tokens",
                f"{tokens.samples} responses of {tokens.horizon} tokens each to "
                f"up to {direction.validation_harmless} {tokens.prompts} prompts; "
                f"{tokens.size} tokens by {tokens.selection}",
            ),
            (
                "distillation",
                f"{steps} steps of {distillation.batch_size} prompts, {anchors} of them harmless, "
                f"{micro_batch} at a time{on}; trains {trained}, "
                f"learning rate {distillation.peak_learning_rate:g}",
            ),
        ),
        steps=steps,
        memory=estimate_memory(
            shape, settings.model, distillation, prompt_tokens=longest, processes=processes
        ),
        present=tuple(name for name in _ARTIFACTS if (work.folder / name).exists()),
    )


def _adapter_parameters(model: PreTrainedModel, distillation: DistillationSettings) -> int:
    """Count what PEFT would train, by putting the adapter on a model without weights."""
    adapter = lora_config(distillation)
    if adapter is None:
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say it will say again when the model is trained
        adapted = get_peft_model(model, adapter)
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def _activations(shape: ModelShape, distillation: DistillationSettings, tokens: int, computing: int) -> int:
    width = shape.query_width * 2 + shape.key_value_width * 2 + 4 * shape.intermediate_size
    layer = tokens * (shape.hidden_size * (4 * computing + 8) + width * computing)
    kept = tokens * shape.hidden_size * computing
    layers = layer + shape.layers * kept if distillation.gradient_checkpointing else shape.layers * layer
    chunk = distillation.divergence_chunk_size
    logits = LOGITS_PER_CHUNK if chunk is None else chunk * shape.vocabulary
    # About five tensors of a chunk's logits live at once (see divergence.py), fewer when there are fewer
    # tokens.
    return layers + 5 * 4 * min(logits, tokens * shape.vocabulary)


def _stored_dtype(shape: ModelShape, model: ModelSettings, gpu: bool) -> torch.dtype:
    if model.dtype == "auto":
        return shape.dtype if gpu else torch.float32
    found = getattr(torch, model.dtype, None)
    if not isinstance(found, torch.dtype) or found not in _BYTES:
        raise SafeSteerError(f"--dtype is {model.dtype!r}; give auto, float32, bfloat16 or float16.")
    return found


def _available(device: torch.device) -> int | None:
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
