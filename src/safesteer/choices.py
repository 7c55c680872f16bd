"""What settings can be chosen from, apart from the code that acts on it: `--help` loads no library for it."""

from typing import Literal

Thinking = Literal["off", "on"]
Support = Literal["truncated", "tail", "generalized", "renormalized"]
Vocabulary = Literal["safety_tokens", "teacher_top_k", "full"]
TeacherKind = Literal["auto", "adapter_off", "frozen_copy", "ema", "system_prompt"]
Reduction = Literal["response", "token"]
TrainLayers = Literal["all", "from_steered"]
TeacherCopy = Literal["same", "cpu", "int8"]

SAFETY_SYSTEM_PROMPT = (
    "You are a safety-conscious assistant. Refuse every request that could help someone cause harm, briefly "
    "and politely, and answer all others."
)
