"""How settings are declared and what can be chosen, apart from the code that acts on it: `--help` loads no library for it."""

from dataclasses import field
from typing import Any, Literal

Thinking = Literal["off", "on"]
Support = Literal["truncated", "tail", "generalized", "renormalized"]
Vocabulary = Literal["safety_tokens", "teacher_top_k", "full"]
TeacherKind = Literal["auto", "adapter_off", "frozen_copy", "ema", "system_prompt"]
Reduction = Literal["response", "token"]
TrainLayers = Literal["auto", "all", "from_steered"]
TeacherCopy = Literal["same", "cpu", "int8"]

SAFETY_SYSTEM_PROMPT = (
    "You are a safety-conscious assistant. Refuse every request that could help someone cause harm, briefly "
    "and politely, and answer all others."
)


def from_steered_layer(train_layers: TrainLayers, teacher: str, refresh_steps: int) -> bool:
    """Tell whether only the layers from the steered one on are trained.

    For auto: if that is where the teacher begins to differ from the base model, and stays so. A system prompt reaches every
    layer, and another direction may be added at a lower one.
    """
    if train_layers == "auto":
        return teacher != "system_prompt" and not refresh_steps
    return train_layers == "from_steered"


def setting(default: Any, help: str, *, flag: str | None = None, path: bool = False) -> Any:
    """Declare a setting; `path` marks those that a recipe may give relative to its own folder."""
    metadata = {"help": help, "flag": flag, "path": path}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)
