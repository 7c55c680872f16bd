"""How strongly the refusal direction is added: the coefficient and its flip rate (method §6.5)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from safesteer.chat import Chat, generate
from safesteer.next_token import Progress
from safesteer.refusals import is_refusal
from safesteer.steering import Steering

FLIP_TOKENS = 16
"""Length of the responses that the flip rate is judged by; a refusal shows in its first words."""

MAXIMUM_DEGENERATE_SHARE = 0.2
"""A coefficient at which more than this share of the steered responses falls apart is too strong."""

# Something of up to 40 characters, three times or more in a row.
_REPETITION = re.compile(r"(.{1,40}?)\1{2,}", re.DOTALL)


@dataclass(frozen=True)
class CoefficientTrial:
    """What steering with one coefficient does to prompts that the unsteered model answers.

    Attributes:
        coefficient: `c`.
        flip_rate: Share that the steered model refuses.
        degenerate_share: Share to which it says nothing, or the same again and again.
    """

    coefficient: float
    flip_rate: float
    degenerate_share: float


@dataclass(frozen=True)
class Strength:
    """The chosen coefficient.

    Attributes:
        coefficient: `c`.
        flip_rate: Its flip rate, between 0 and 1; NaN if the unsteered model answers no prompt at all.
        trials: Every coefficient tried, in order.
        prompts: Which prompts were flipped: "harmful", or "harmless" if the model answers no harmful one.
        answered: How many of them the unsteered model answers.
    """

    coefficient: float
    flip_rate: float
    trials: tuple[CoefficientTrial, ...]
    prompts: str
    answered: int


def choose_coefficient(
    model: PreTrainedModel,
    chat: Chat,
    steering: Steering,
    harmful: Sequence[str],
    harmless: Sequence[str],
    coefficients: Sequence[float],
    *,
    target_flip_rate: float,
    layer_path: str | None,
    batch_size: int,
    progress: Progress,
) -> Strength:
    """Raise `c` until the steered model refuses what the unsteered one answers, or stops making sense.

    Responses are greedy and 16 tokens long. The search ends with the first coefficient whose flip rate
    reaches the target, or before the first at which over 20 % of the responses are degenerate. If the target
    is not reached, the coefficient with the highest flip rate is kept (of equals the smallest).

    Args:
        model: A causal language model.
        chat: How it is asked.
        steering: The refusal direction; its own coefficient is not used.
        harmful: Validation prompts, not filtered by refusal score: those the model answers are to be flipped.
        harmless: Validation prompts, taken instead when the model answers no harmful one.
        coefficients: To try, smallest first.
        target_flip_rate: At which to stop.
        layer_path: Where the decoder layers are, if they cannot be found.
        batch_size: Prompts at a time.
        progress: Told how many coefficients have been tried.
    """

    def respond(prompts: Sequence[str]) -> list[str]:
        return generate(model, chat, prompts, max_new_tokens=FLIP_TOKENS, batch_size=batch_size)

    def answered_of(prompts: Sequence[str]) -> list[str]:
        return [
            prompt
            for prompt, response in zip(prompts, respond(prompts), strict=True)
            if not is_refusal(response)
        ]

    ascending = sorted(coefficients)
    kind, answered = "harmful", answered_of(harmful)
    if not answered:
        kind, answered = "harmless", answered_of(harmless)
    if not answered:
        return Strength(ascending[0], math.nan, (), kind, 0)
    trials: list[CoefficientTrial] = []
    for coefficient in ascending:
        progress(f"coefficient: {coefficient:g}", len(trials), len(ascending))
        with replace(steering, coefficient=coefficient).applied(model, layer_path):
            responses = respond(answered)
        refused = [is_refusal(response) for response in responses]
        fallen = [
            is_degenerate(response) and not refuses
            for response, refuses in zip(responses, refused, strict=True)
        ]
        trials.append(
            CoefficientTrial(coefficient, sum(refused) / len(answered), sum(fallen) / len(answered))
        )
        if trials[-1].flip_rate >= target_flip_rate or trials[-1].degenerate_share > MAXIMUM_DEGENERATE_SHARE:
            break
    progress("coefficient", len(ascending), len(ascending))
    sensible = [trial for trial in trials if trial.degenerate_share <= MAXIMUM_DEGENERATE_SHARE]
    best = max(sensible, key=lambda trial: trial.flip_rate, default=trials[0])
    return Strength(best.coefficient, best.flip_rate, tuple(trials), kind, len(answered))


def is_degenerate(text: str) -> bool:
    """Say whether a response is empty, or mostly one thing three or more times in a row."""
    stripped = text.strip()
    longest = max((len(match[0]) for match in _REPETITION.finditer(stripped)), default=0)
    return not stripped or (longest >= 8 and 2 * longest >= len(stripped))
