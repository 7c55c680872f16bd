"""The memory that the distillation needs, from the model's configuration alone, and the micro batch that fits."""

import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from safesteer.divergence import default_chunk_size
from safesteer.errors import SafeSteerError, one_line
from safesteer.loading import adapter_config, choose_device
from safesteer.modeling import decoder_layers
from safesteer.settings import DistillationSettings, ModelSettings
from safesteer.training_arguments import (
    DEFAULT_MICRO_BATCH,
    lora_config,
    memory_remedies,
    micro_batches,
    number_of_processes,
    require_lora_targets,
)
from safesteer.workspace import Workspace

# Left free for the CUDA context, fragmentation, and what the estimate does not know.
_USABLE = 0.85
# Float32 tensors of a chunk's logits that live at once (see divergence.py), with the gradient's narrower copy for its products.
_CHUNKS_ALIVE = {"safety_tokens": 2, "teacher_top_k": 3, "full": 8}
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
        micro_batch: Prompts of one pass, for which activations were counted.
        rollout_batch: Responses sampled at a time.
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
    micro_batch: int
    rollout_batch: int

    @property
    def lasting(self) -> int:
        """What is there from the first step to the last."""
        return self.weights + self.teacher_copy + self.adapter + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The most there is at a time: activations and the rollout's cache never live together."""
        return self.lasting + max(self.activations, self.rollout_cache)

    @property
    def passes_fit(self) -> bool:
        """Whether a micro batch's passes are estimated to fit into the memory that may be used."""
        return self._fits(self.activations)

    @property
    def sampling_fits(self) -> bool:
        """The same of the rollout."""
        return self._fits(self.rollout_cache)

    def _fits(self, passing: int) -> bool:
        return self.available is None or self.lasting + passing <= _USABLE * self.available


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its memory and its candidates; read from a copy without weights.

    `layer_parameters` are those of all decoder layers, `linear_parameters` the weights of linear maps in them.
    """

    parameters: int
    layer_parameters: int
    linear_parameters: int
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
    layers = decoder_layers(model, settings.layer_path)
    linear = [module.weight.numel() for module in layers.modules() if type(module) is nn.Linear]
    layer_parameters = sum(weight.numel() for weight in layers.parameters())
    adapter_parameters = _adapter_parameters(model, distillation)
    return ModelShape(
        parameters=parameters,
        layer_parameters=layer_parameters,
        linear_parameters=sum(linear),
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
        distillation: For what is trained, and how much at a time; a micro batch of auto is the one that
            `fitting_micro_batch` finds, or one prompt.
        prompt_tokens: Longest rendered prompt.
        processes: Devices in the run.
    """
    if distillation.micro_batch_size == "auto":
        found = fitting_micro_batch(
            shape, model, distillation, prompt_tokens=prompt_tokens, processes=processes
        )
        distillation = replace(distillation, micro_batch_size=found or 1)
    device = _device(model)
    gpu = device.type == "cuda"
    stored = _stored_dtype(shape, model, gpu)
    trained_bytes = 4 if distillation.lora or distillation.master_dtype == "float32" else 2
    adapter = 4 * shape.adapter_parameters
    weights = shape.parameters * (_BYTES[stored] if distillation.lora else trained_bytes)
    trained = adapter if distillation.lora else shape.parameters * trained_bytes
    copied = distillation.teacher in ("frozen_copy", "ema") or not distillation.lora
    computing = 2 if gpu or stored != torch.float32 else 4
    tokens = prompt_tokens + distillation.sampled_tokens
    micro_batch, passes = micro_batches(distillation, processes)
    rollout_batch = micro_batch * passes
    return MemoryEstimate(
        weights=weights,
        teacher_copy=_teacher_copy(shape, distillation, weights, gpu) if copied else 0,
        adapter=adapter,
        gradients=trained,
        optimizer=2 * trained,
        activations=_activations(shape, distillation, micro_batch * tokens, computing),
        rollout_cache=2 * shape.layers * shape.key_value_width * computing * rollout_batch * tokens,
        available=_available(device),
        device=_device_name(device),
        micro_batch=micro_batch,
        rollout_batch=rollout_batch,
    )


def fitting_micro_batch(
    shape: ModelShape,
    model: ModelSettings,
    distillation: DistillationSettings,
    *,
    prompt_tokens: int,
    processes: int = 1,
) -> int | None:
    """Find the largest micro batch that divides a device's share of a step evenly and is estimated to fit.

    That is into 85 % of the device's memory. Off the GPU, where larger batches are hardly faster and memory
    that runs out may end the process without an error, it is at most `DEFAULT_MICRO_BATCH`, as it is where
    the memory cannot be told.

    Args:
        shape: Of the model, as the rest for `estimate_memory`.
        model: For dtype and device.
        distillation: For all but the micro batch.
        prompt_tokens: Longest rendered prompt.
        processes: Devices in the run.

    Returns:
        Prompts per pass; None if not even one fits.
    """
    device = _device(model)
    told = device.type == "cuda" and _available(device) is not None
    size = distillation.batch_size if told else DEFAULT_MICRO_BATCH
    while size:
        size, _ = micro_batches(replace(distillation, micro_batch_size=size), processes)
        trial = replace(distillation, micro_batch_size=size)
        if estimate_memory(shape, model, trial, prompt_tokens=prompt_tokens, processes=processes).passes_fit:
            return size
        size -= 1
    return None


def planned_memory(work: Workspace, shape: ModelShape) -> tuple[MemoryEstimate, str | None]:
    """Estimate a run's memory before its model is loaded.

    Args:
        work: The run.
        shape: Of its model.

    Returns:
        The estimate, for the micro batch that the run would train with; and what to do about it if it exceeds
        85 % of the device's memory.
    """
    model, distillation = work.settings.model, work.settings.distillation
    processes = number_of_processes()
    prompts = (*work.harmful.prompts, *work.harmless.prompts)
    longest = max(map(len, work.chat.encode(prompts, max_length=distillation.max_prompt_length)))
    memory = estimate_memory(shape, model, distillation, prompt_tokens=longest, processes=processes)
    if memory.passes_fit and memory.sampling_fits:
        return memory, None
    if memory.passes_fit:
        return memory, (
            f"The keys and values of {memory.rollout_batch} responses, sampled together, are estimated not to "
            "fit; lower --max-completion-length or --batch-size."
        )
    fitting = fitting_micro_batch(shape, model, distillation, prompt_tokens=longest, processes=processes)
    if fitting is not None:
        return memory, (
            f"{memory.micro_batch} prompts at a time are estimated not to fit; give --micro-batch-size "
            f"{fitting}, or auto."
        )
    return memory, f"Not even one prompt at a time is estimated to fit; {memory_remedies(distillation)}."


def planned_micro_batch(work: Workspace) -> int:
    """Return the micro batch that a run starts to train with, the same on all its processes.

    For auto it is chosen from the estimate, and told.
    """
    distillation = work.settings.distillation
    if distillation.micro_batch_size != "auto":
        return micro_batches(distillation, number_of_processes())[0]
    size, advice = micro_batches(distillation, number_of_processes())[0], None
    try:
        shape = model_shape(work.settings.model, distillation)
    except (SafeSteerError, AttributeError, NotImplementedError, TypeError, ValueError):
        pass  # models may be trained whose configuration does not tell their shape
    else:
        memory, advice = planned_memory(work, shape)
        size = memory.micro_batch
    size = int(min(gather_object([size])))
    work.console.note(f"training on {size} prompts at a time (micro_batch_size: auto)")
    if advice is not None:
        work.console.note(advice)
    return size


def _adapter_parameters(model: PreTrainedModel, distillation: DistillationSettings) -> int:
    """Count what PEFT would train, by putting the adapter on a model without weights."""
    adapter = lora_config(distillation)
    if adapter is None:
        return 0
    require_lora_targets(model, distillation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say it will say again when the model is trained
        adapted = get_peft_model(model, adapter)
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def _teacher_copy(shape: ModelShape, distillation: DistillationSettings, weights: int, gpu: bool) -> int:
    """Count the bytes of a second copy on the device (see `teacher_copies`); `weights` are the first's."""
    kind, each = distillation.teacher_copy, weights // shape.parameters
    if kind == "same" or (kind == "cpu" and not gpu):
        return weights
    if distillation.lora:
        return 0  # what is not trained is shared
    if kind == "int8":
        return weights - shape.linear_parameters * (each - 1)
    # The layer that runs, and the one that is fetched meanwhile.
    present = min(2, shape.layers) * shape.layer_parameters // shape.layers
    return each * (shape.parameters - shape.layer_parameters + present)


def _activations(shape: ModelShape, distillation: DistillationSettings, tokens: int, computing: int) -> int:
    width = shape.query_width * 2 + shape.key_value_width * 2 + 4 * shape.intermediate_size
    layer = tokens * (shape.hidden_size * (4 * computing + 8) + width * computing)
    kept = tokens * shape.hidden_size * computing
    layers = layer + shape.layers * kept if distillation.gradient_checkpointing else shape.layers * layer
    chunk = distillation.divergence_chunk_size or default_chunk_size(tokens, shape.vocabulary)
    alive = _CHUNKS_ALIVE[distillation.vocabulary]
    return layers + alive * 4 * min(chunk, tokens) * shape.vocabulary


def _device(model: ModelSettings) -> torch.device:
    # A device that this machine lacks may be planned for.
    return torch.device(model.device) if model.device else choose_device(None)


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
