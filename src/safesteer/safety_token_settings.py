"""Settings of the count of safety tokens."""

from dataclasses import dataclass
from typing import Literal

from safesteer.choices import setting
from safesteer.errors import SafeSteerError


@dataclass(frozen=True)
class SafetyTokenSettings:
    """How the safety tokens are counted; the defaults are the method's (§3 and §4)."""

    horizon: int = setting(
        7, "Length H of the trajectories: the first so many positions of a response are compared."
    )
    votes_per_position: int = setting(200, "Each position votes for so many tokens (K').")
    size: int = setting(50, "Keep at most so many tokens (K).")
    samples: int = setting(8, "Trajectories per prompt (N), sampled from the teacher at temperature 1.")
    minimum_probability: float = setting(
        1e-8, "Ban tokens to which the teacher gives less than this on average."
    )
    selection: Literal["vote", "mean"] = setting(
        "vote", "Keep the tokens with most votes, or with the highest mean log-ratio."
    )
    prompts: Literal["harmless", "harmful"] = setting(
        "harmless",
        "What the trajectories answer: harmless prompts (the method; the teacher must refuse them), or harmful ones.",
    )
    batch_size: int = setting(64, "Trajectories at a time.")
    seed: int = setting(42, "Seed of the trajectories.")

    def __post_init__(self) -> None:
        """Check what nothing could be counted with.

        Raises:
            SafeSteerError: If a setting is out of its range.
        """
        for name in ("horizon", "votes_per_position", "size", "samples", "batch_size"):
            self._require(name, getattr(self, name) >= 1, "a whole number from 1")
        self._require(
            "minimum_probability", 0 <= self.minimum_probability < 1, "a probability from 0 to below 1"
        )
        self._require("prompts", self.prompts in ("harmless", "harmful"), "harmless or harmful")
        self._require("selection", self.selection in ("vote", "mean"), "vote or mean")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise SafeSteerError(f"safety_tokens.{name} is {getattr(self, name)!r}; give {what}.")
