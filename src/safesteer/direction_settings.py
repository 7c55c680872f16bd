"""Settings of the search for the refusal direction."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from safesteer.errors import SafeSteerError


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DirectionSettings:
    """How the refusal direction is searched for; the defaults are the method's (§1), the coefficient's ours
    (§6.5)."""

    train_harmful: int = _setting(128, "Harmful prompts whose activations are averaged.")
    train_harmless: int = _setting(128, "Harmless prompts whose activations are averaged.")
    validation_harmful: int = _setting(32, "Harmful prompts that candidates are scored on.")
    validation_harmless: int = _setting(
        32, "Harmless prompts that candidates are scored on; the safety tokens are counted on them too."
    )
    max_kl: float = _setting(0.1, "Discard candidates whose ablation moves harmless prompts by more (KL,
        nats).")
    min_induction: float = _setting(0.0, "Discard candidates that induce refusals of harmless prompts less
        (log-odds).")
    prune_layers_above: float = _setting(0.8, "Discard layers from this share of the depth on.")
    filter_prompts: bool = _setting(
        True, "Use only the harmful prompts that the model refuses and the harmless ones that it does not."
    )
    coefficient: float | None = _setting(None, "Strength of the steering; none searches `coefficients`.")
    coefficients: tuple[float, ...] = _setting((1.0, 1.5, 2.0, 3.0), "Strengths to try, up to the target flip
        rate.")
    target_flip_rate: float = _setting(0.9, "Share of answered harmful prompts that steering shall turn into
        refusals.")
    refusal_token_ids: tuple[int, ...] | None = _setting(
        None, "Tokens that open this model's refusals, e.g. 40,2121,2753,2132 for Qwen3; none detects them."
    )
    fallback: Literal["error", "relax"] = _setting(
        "relax", "When no candidate passes: stop, or relax the induction test and say so."
    )
    batch_size: int = _setting(32, "Prompts at a time.")
    seed: int = _setting(42, "Seed of the prompts' sample and of the responses that openers are found in.")

    def __post_init__(self) -> None:
        """Check what no search could work with.

        Raises:
            SafeSteerError: If a setting is out of its range.
        """
        counts = ("train_harmful", "train_harmless", "validation_harmful", "validation_harmless",
        "batch_size") for name in counts:
            if getattr(self, name) < 1:
                raise SafeSteerError(f"direction.{name} is {getattr(self, name)}; give 1 or more.")
        if not 0 < self.prune_layers_above <= 1:
            raise SafeSteerError(
                f"direction.prune_layers_above is {self.prune_layers_above}; give a share above 0 and up to
                1."
            )
        if not 0 <= self.target_flip_rate <= 1:
            raise SafeSteerError(
                f"direction.target_flip_rate is {self.target_flip_rate}; give a share from 0 to 1."
            )
        given = self.coefficients if self.coefficient is None else (self.coefficient,)
        if not given or not all(math.isfinite(coefficient) and coefficient > 0 for coefficient in given):
            name = "coefficients" if self.coefficient is None else "coefficient"
            raise SafeSteerError(f"direction.{name} is {getattr(self, name)}; give numbers above 0.")
        if self.fallback not in ("error", "relax"):
            raise SafeSteerError(f"direction.fallback is {self.fallback!r}; give error or relax.")
