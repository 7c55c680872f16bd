"""Whether model, settings and arguments of a training run fit together, checked before it starts."""

from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from safesteer.errors import SafeSteerError
from safesteer.modeling import hidden_size
from safesteer.steering import Steering
from safesteer.trainer_config import SafeSteerConfig


def check_fit(
    model: PreTrainedModel | PeftModel,
    args: SafeSteerConfig,
    steering: Steering | None,
    peft_config: PeftConfig | None,
    *,
    has_refresh: bool,
    has_probe: bool,
) -> None:
    """Check what `SafeSteerConfig` cannot know alone.

    Raises:
        SafeSteerError: For the first rule that is broken.
    """
    with_adapter = peft_config is not None or isinstance(model, PeftModel)
    quantized = any(getattr(_base(model), f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if quantized and args.use_vllm:
        raise SafeSteerError(
            "use_vllm cannot be combined with a quantized model (QLoRA), because the adapter would have to "
            "be merged into 4- or 8-bit weights every step and vLLM would sample from a rounded student; "
            "turn off use_vllm or load the model unquantized."
        )
    if quantized and not with_adapter:
        raise SafeSteerError(
            "a quantized model's weights cannot be trained; give a LoRA adapter to train (peft_config)."
        )
    if args.teacher == "adapter_off" and not with_adapter:
        raise SafeSteerError(
            "teacher adapter_off needs an adapter to turn off; give a LoRA adapter (peft_config) or use "
            "frozen_copy."
        )
    if quantized and args.teacher in ("frozen_copy", "ema"):
        raise SafeSteerError(
            f"a quantized model cannot be copied for teacher {args.teacher}; use adapter_off."
        )
    if steering is None and (args.teacher != "system_prompt" or args.train_layers == "from_steered"):
        raise SafeSteerError(
            "no refusal direction was given, which only teacher system_prompt with train_layers all can do "
            "without; give a direction."
        )
    if steering is not None and steering.vector.shape != (hidden_size(model),):
        raise SafeSteerError(
            f"the refusal direction has shape {list(steering.vector.shape)} but the model's residual stream "
            f"is {hidden_size(model)} wide; use the direction that was found on this model."
        )
    if args.train_layers == "from_steered" and isinstance(model, PeftModel):
        raise SafeSteerError(
            "train_layers from_steered cannot restrict an adapter that the model already has; "
            "give the base model and a peft_config, or train all layers."
        )
    if args.n_gpu > 1 and not getattr(_base(model), "hf_device_map", None):
        raise SafeSteerError(
            f"{args.n_gpu} GPUs are visible to one process, which would run the model in copies that hooks "
            "do not reach; start with `accelerate launch` or make one GPU visible with CUDA_VISIBLE_DEVICES."
        )
    if args.refresh_steps and not has_refresh:
        raise SafeSteerError(
            "refresh_steps is set but nothing was given that finds direction and tokens; give refresh or "
            "set it to 0."
        )
    if args.probe_steps and not has_probe:
        raise SafeSteerError("probe_steps is set but no probe prompts were given; give probe or set it to 0.")


def _base(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
