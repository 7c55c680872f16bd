"""The stages before training, each computed once and kept: refusal direction and safety tokens.

A stage's artifact carries the fingerprint of everything it depends on: the stage's settings, the model, the
chat format, the prompts, and the artifact before it. An artifact with the same fingerprint is loaded instead
of computed, any other is computed anew.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from safesteer.artifacts import read_json
from safesteer.console import ProgressCallback
from safesteer.direction import RefusalDirection, direction_fingerprint, find_refusal_direction
from safesteer.errors import SafeSteerError
from safesteer.out_of_memory import with_smaller_batches
from safesteer.safety_tokens import (
    SafetyTokens,
    find_safety_tokens,
    safety_tokens_fingerprint,
    steering_fingerprint,
)
from safesteer.workspace import Workspace

Found = TypeVar("Found")

DIRECTION_FILE = "direction.json"
TOKENS_FILE = "safety_tokens.json"

_REMEDIES = (
    "load the weights in fewer bits (--dtype bfloat16), leave out the longest prompts, or take a device with "
    "more memory"
)


def direction_stage(work: Workspace) -> RefusalDirection:
    """Load the run's refusal direction if its inputs are unchanged, else find and save it (method §1)."""
    settings = work.settings.direction
    prompts = (work.direction_harmful, work.harmless)
    wanted = direction_fingerprint(work.model_fingerprint, work.chat, *prompts, settings)
    started = time.monotonic()
    kept = is_current(work, work.folder / DIRECTION_FILE, wanted)
    if kept:
        direction = RefusalDirection.load(work.folder)
    else:
        direction = _searched(
            work,
            "direction",
            settings.batch_size,
            lambda batch_size, progress: find_refusal_direction(
                work.model,
                work.chat,
                *prompts,
                replace(settings, batch_size=batch_size),
                layer_path=work.settings.model.layer_path,
                progress=progress,
            ),
        )
        # Of the batch size that was asked for, so that the next run keeps what was found.
        direction = replace(direction, fingerprint=wanted)
        direction.save(work.folder)
    flips = (
        ""
        if math.isnan(direction.flip_rate)
        else f"; flips {direction.flip_rate:.0%} of {direction.flip_answered} answered {direction.flip_prompts} prompts"
    )
    where = " at the post-instruction tokens" if direction.at else ""
    work.console.summary(
        "direction",
        f"layer {direction.layer}, position {direction.position}, "
        f"coefficient {direction.coefficient:g}{where}{flips}",
        " · ".join(filter(None, [outcome(work.folder / DIRECTION_FILE, kept, started), direction.relaxed])),
    )
    return direction


def tokens_stage(work: Workspace, direction: RefusalDirection) -> SafetyTokens:
    """Load the run's safety tokens if their inputs are unchanged, else find and save them (method §3)."""
    settings = work.settings.safety_tokens
    prompts = contrast_prompts(work, direction)
    wanted = safety_tokens_fingerprint(
        work.model_fingerprint, work.chat, prompts, direction.steering, settings
    )
    started = time.monotonic()
    kept = is_current(work, work.folder / TOKENS_FILE, wanted)
    if kept:
        tokens = SafetyTokens.load(work.folder)
    else:
        tokens = _searched(
            work,
            "safety tokens",
            settings.batch_size,
            lambda batch_size, progress: find_safety_tokens(
                work.model,
                work.chat,
                prompts,
                direction.steering,
                replace(settings, batch_size=batch_size),
                layer_path=work.settings.model.layer_path,
                progress=progress,
            ),
        )
        tokens = replace(tokens, fingerprint=wanted)
        tokens.save(work.folder)
    first = " ".join(repr(token.text) for token in tokens.tokens[:8])
    work.console.summary(
        "safety tokens",
        f"{len(tokens.tokens)} tokens from {tokens.counted_positions} positions: {first}",
        outcome(work.folder / TOKENS_FILE, kept, started),
    )
    return tokens


def _searched(
    work: Workspace, stage: str, batch_size: int, search: Callable[[int, ProgressCallback], Found]
) -> Found:
    """Search under a progress bar, in smaller batches when memory runs out."""
    with work.console.stage(stage) as progress:
        return with_smaller_batches(
            lambda smaller: search(smaller, progress),
            batch_size,
            what=stage,
            note=work.console.note,
            remedies=_REMEDIES,
        )


def contrast_prompts(work: Workspace, direction: RefusalDirection) -> Sequence[str]:
    """The prompts whose refusals tell the safety tokens.

    The method takes the harmless validation prompts, which a strong teacher refuses. A teacher that tells
    harmful from harmless refuses few of those; its refusals are then found on harmful prompts.
    """
    settings = work.settings.safety_tokens
    if settings.prompts == "harmless":
        return direction.validation_harmless
    count = min(work.settings.direction.validation_harmless, len(work.direction_harmful))
    return work.direction_harmful.take(count, settings.seed).prompts


def saved_direction(work: Workspace) -> RefusalDirection:
    """Load the direction that is in the run, whatever settings it was found with.

    Raises:
        SafeSteerError: If there is none, it is corrupt, or it was found on another model.
    """
    _require(work.folder / DIRECTION_FILE, "safesteer direction")
    direction = RefusalDirection.load(work.folder)
    direction.require_model(work.model_fingerprint)
    return direction


def saved_tokens(work: Workspace, direction: RefusalDirection) -> SafetyTokens:
    """Load the safety tokens that are in the run, whatever settings they were found with.

    Says so when they were found with another direction than the one they are to be used with.

    Raises:
        SafeSteerError: If there are none, they are corrupt, or they were found on another model.
    """
    _require(work.folder / TOKENS_FILE, "safesteer tokens")
    tokens = SafetyTokens.load(work.folder)
    tokens.require_model(work.model_fingerprint)
    if tokens.steering_fingerprint not in ("", steering_fingerprint(direction.steering)):
        work.console.note(
            f"{work.folder / TOKENS_FILE}: found with another direction than {DIRECTION_FILE} holds now; "
            f"`safesteer tokens --output {work.folder}` finds those of this one."
        )
    return tokens


def is_current(work: Workspace, record: Path, wanted: str) -> bool:
    """Whether an artifact is there and was made from the inputs there are now; says so when it was not.

    Args:
        work: The run.
        record: JSON file that holds the artifact's fingerprint.
        wanted: The fingerprint of the inputs there are now.

    Raises:
        SafeSteerError: If the file is damaged.
    """
    if not record.is_file():
        return False
    if read_json(record).get("fingerprint") == wanted:
        return True
    work.console.note(
        f"{record}: made from other inputs or settings; it is made anew, and what depends on it."
    )
    return False


def outcome(path: Path, kept: bool, started: float) -> str:
    """Say where an artifact is, and whether it was kept or how long it took."""
    return (
        f"kept {path}, its inputs are unchanged" if kept else f"{time.monotonic() - started:.0f} s · {path}"
    )


def _require(path: Path, command: str) -> None:
    if not path.is_file():
        raise SafeSteerError(
            f"{path}: no such file; run `{command} --output {path.parent}` first, or `safesteer align`."
        )
