"""Settings of the search for the refusal direction."""

import math
from dataclasses import dataclass
from typing import Literal

from safesteer.choices import setting
from safesteer.errors import SafeSteerError


@dataclass(frozen=True)
class DirectionSettings:
    """How the refusal direction is searched for.

    The defaults are the method's (§1), except that the coefficient is searched for too (§6.5) and that the
    induction test has a fallback.
    """

    train_harmful: int = setting(128, "Harmful prompts whose activations are averaged.")
    train_harmless: int = setting(128, "Harmless prompts whose activations are averaged.")
    validation_harmful: int = setting(32, "Harmful prompts that candidates are scored on.")
    validation_harmless: int = setting(
        32, "Harmless prompts that candidates are scored on; the safety tokens are counted on them too."
    )
    max_kl: float = setting(
        0.1, "Discard candidates whose ablation moves harmless prompts by more (KL, nats)."
    )
    min_induction: float = setting(
        0.0,
        "Discard candidates that induce refusals less, of harmless prompts or of those given by `contrast` (log-odds).",
    )
    prune_layers_above: float = setting(0.8, "Discard layers from this share of the depth on.")
    filter_prompts: bool = setting(
        True, "Use only the harmful prompts that the model refuses and the harmless ones that it does not."
    )
    contrast: Literal["harmless", "answered"] = setting(
        "harmless",
        "What refused harmful prompts are contrasted with, and made to be refused by a good candidate: "
        "harmless ones (the method), or harmful ones that the model answers.",
    )
    criterion: Literal["ablation", "induction"] = setting(
        "ablation",
        "Which of the candidates that pass is taken: whose ablation leaves the least refusal (the method), or whose addition, "
        "with `coefficient` if it is given, as the teacher adds it, induces the most.",
    )
    positions: Literal["all", "post_instruction"] = setting(
        "all",
        "Where the vector is added: at every position (the method), or at the template's tokens after the instruction alone, so "
        "that instruction and response are read as they stand.",
    )
    coefficient: float | None = setting(None, "Strength of the steering; none searches `coefficients`.")
    coefficients: tuple[float, ...] = setting(
        (1.0, 1.5, 2.0, 3.0), "Strengths to try, up to the target flip rate."
    )
    target_flip_rate: float = setting(
        0.9, "Share of answered harmful prompts that steering shall turn into refusals."
    )
    refusal_token_ids: tuple[int, ...] | None = setting(
        None, "Tokens that open this model's refusals, e.g. 40,2121,2753,2132 for Qwen3; none detects them."
    )
    fallback: Literal["error", "relax"] = setting(
        "relax", "When no candidate passes: stop, or relax the induction test and say so."
    )
    batch_size: int = setting(32, "Prompts at a time.")
    seed: int = setting(42, "Seed of the prompts' sample and of the responses that openers are found in.")

    def __post_init__(self) -> None:
        """Check what no search could work with.

        Raises:
            SafeSteerError: If a setting is out of its range.
        """
        for kind in ("harmful", "harmless"):
            for name in (f"train_{kind}", f"validation_{kind}"):
                self._require(name, getattr(self, name) >= 1, "a number of prompts, 1 or more")
        self._require("batch_size", self.batch_size >= 1, "a number of prompts, 1 or more")
        self._require("prune_layers_above", 0 < self.prune_layers_above <= 1, "a share above 0 and up to 1")
        self._require("target_flip_rate", 0 <= self.target_flip_rate <= 1, "a share from 0 to 1")
        self._require(
            "coefficient", self.coefficient is None or _positive(self.coefficient), "a number above 0"
        )
        positive = bool(self.coefficients) and all(map(_positive, self.coefficients))
        self._require("coefficients", positive, "numbers above 0")
        self._require("contrast", self.contrast in ("harmless", "answered"), "harmless or answered")
        self._require(
            "filter_prompts",
            self.filter_prompts or self.contrast == "harmless",
            "true, because contrast answered needs to know which prompts are answered",
        )
        self._require("criterion", self.criterion in ("ablation", "induction"), "ablation or induction")
        self._require("positions", self.positions in ("all", "post_instruction"), "all or post_instruction")
        self._require("fallback", self.fallback in ("error", "relax"), "error or relax")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise SafeSteerError(f"direction.{name} is {getattr(self, name)!r}; give {what}.")


def _positive(number: float) -> bool:
    return math.isfinite(number) and number > 0
