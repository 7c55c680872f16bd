"""Load a chat model and its tokenizer, from a folder or the hub; also an adapter with its base model."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from safesteer.errors import SafeSteerError, one_line

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens that checkpoints set aside for padding without saying so in their config.
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>")
# What transformers, peft and huggingface_hub raise when a name, revision or file is wrong.
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, or a PEFT adapter with its base model, in evaluation mode.

    Args:
        name: A folder or a hub id; of safetensors weights, since pickle is never loaded.
        revision: Branch, tag or commit on the hub.
        dtype: "auto" (the checkpoint's on a GPU, float32 on the CPU), "float32", "bfloat16" or "float16".
        device: Such as "cuda", "cuda:1", "mps" or "cpu"; the best there is by default.
        trust_remote_code: Run Python code that comes with the checkpoint.
        attn_implementation: As in transformers, such as "sdpa" or "flash_attention_2".

    Returns:
        The model; a `PeftModel` (which is typed as what it wraps) for an adapter.

    Raises:
        SafeSteerError: If it cannot be loaded.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise SafeSteerError(f"dtype {dtype!r} is unknown; choose one of: auto, {', '.join(_DTYPES)}.")
    target = choose_device(device)
    adapter = adapter_config(name, revision)
    if adapter is not None and not _has_file(name, "adapter_model.safetensors", revision):
        raise SafeSteerError(
            f"{name}: has an adapter_config.json but no adapter_model.safetensors, and pickled weights are "
            "never loaded; save the adapter as safetensors."
        )
    try:
        base = AutoModelForCausalLM.from_pretrained(
            name if adapter is None else adapter.base_model_name_or_path,
            revision=revision if adapter is None else adapter.revision,
            dtype=_DTYPES.get(dtype, torch.float32 if target.type == "cpu" else "auto"),
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            use_safetensors=True,
        )
        model = base if adapter is None else PeftModel.from_pretrained(base, name, revision=revision)
        model.to(target)  # type: ignore[arg-type]  # transformers decorates it in a way mypy misreads
    except (*_LOADING_ERRORS, RuntimeError) as error:
        raise SafeSteerError(
            f"{name}: cannot be loaded as a causal language model ({one_line(error)}); "
            "check the name, the revision and that its weights are safetensors."
        ) from error
    model.eval()
    return cast(PreTrainedModel, model)


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
) -> PreTrainedTokenizerBase:
    """Load a chat tokenizer: left padding, a pad token set, a chat template present.

    Args:
        name: A folder or a hub id; for an adapter without tokenizer files, its base model's tokenizer is
            loaded.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with the checkpoint.
        chat_template: A Jinja template to use instead of the tokenizer's own: a file, or the text itself.

    Raises:
        SafeSteerError: If it cannot be loaded, or has no chat template or nothing to pad with.
    """
    adapter = adapter_config(name, revision)
    if adapter is not None and not _has_file(name, "tokenizer_config.json", revision):
        name, revision = adapter.base_model_name_or_path, adapter.revision
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    except _LOADING_ERRORS as error:
        raise SafeSteerError(
            f"{name}: its tokenizer cannot be loaded ({one_line(error)}); check the name and the revision."
        ) from error
    tokenizer.padding_side = "left"
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    if not tokenizer.chat_template:
        raise SafeSteerError(
            f"{name}: its tokenizer has no chat template, so it is not a chat model's; choose an instruct "
            "model or give a Jinja file with --chat-template."
        )
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next(
            (token for token in _PAD_TOKENS if token in vocabulary), tokenizer.eos_token
        )
        if tokenizer.pad_token_id is None:
            raise SafeSteerError(
                f"{name}: its tokenizer has neither a pad nor an end-of-sequence token; set one in "
                "tokenizer_config.json."
            )
    return tokenizer


def choose_device(name: str | None) -> torch.device:
    """Turn a device's name into the device; without one, choose the best there is (cuda, then mps, then cpu).

    Raises:
        SafeSteerError: If PyTorch knows no such device, or this machine has none.
    """
    if name is None:
        if torch.cuda.is_available():
            # Under torchrun and accelerate every process has a GPU of its own.
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SafeSteerError(
            f"device {name!r} is unknown; give one such as cuda, cuda:1, mps or cpu."
        ) from None
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(device.type):
        raise SafeSteerError(
            f"device {name!r}: this machine has none that PyTorch can use; give --device cpu."
        )
    return device


def _has_file(name: str, file: str, revision: str | None) -> bool:
    """Say whether a folder or hub repository has a file."""
    return (
        cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        is not None
    )


def adapter_config(name: str, revision: str | None) -> Any | None:
    """Read the PEFT config at a folder or hub id, None where there is none.

    Raises:
        SafeSteerError: If there is one that cannot be read or names no base model.
    """
    try:
        if not _has_file(name, "adapter_config.json", revision):
            return None
    except OSError:  # no such repository: loading the model itself will tell
        return None
    try:
        config = PeftConfig.from_pretrained(name, revision=revision)
    except _LOADING_ERRORS + (TypeError,) as error:
        raise SafeSteerError(
            f"{name}: its adapter_config.json cannot be read ({one_line(error)}); save the adapter again."
        ) from error
    if not config.base_model_name_or_path:
        raise SafeSteerError(
            f"{name}: its adapter_config.json names no base_model_name_or_path; write the base model's name "
            "there."
        )
    return config


def _template_text(chat_template: str | Path) -> str:
    if isinstance(chat_template, str) and "{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SafeSteerError(
            f"chat template {chat_template}: cannot be read ({one_line(error)}); give a Jinja file in UTF-8."
        ) from error
