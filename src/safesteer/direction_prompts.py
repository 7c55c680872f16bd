"""The prompts a refusal direction is found with: sampled, divided, filtered by refusal score (method §1)."""

from safesteer.direction_scores import refusal_scores
from safesteer.direction_settings import DirectionSettings
from safesteer.errors import SafeSteerError
from safesteer.next_token import NextTokenReader, Progress
from safesteer.openers import RefusalOpeners
from safesteer.prompts import PromptSet

_FEWEST_PROMPTS = 8
_FEWEST_FILTERED = 4

DirectionPrompts = dict[str, tuple[str, ...]]
"""The four sets by name: train_harmful, validation_harmful, train_harmless, validation_harmless; after the filter, if wanted,
also train_answered and validation_answered: harmful prompts that the model answers."""


def sampled_prompts(harmful: PromptSet, harmless: PromptSet, settings: DirectionSettings) -> DirectionPrompts:
    """Sample disjoint train and validation sets; small sets are divided in the same proportion."""
    samples: DirectionPrompts = {}
    for kind, prompts in (("harmful", harmful), ("harmless", harmless)):
        train: int = getattr(settings, f"train_{kind}")
        validation: int = getattr(settings, f"validation_{kind}")
        available = len(prompts.prompts)
        if available < _FEWEST_PROMPTS:
            raise SafeSteerError(
                f"{prompts.source}: has {available} {kind} prompts, too few to find a refusal direction; "
                f"give at least {_FEWEST_PROMPTS}, better {train + validation}."
            )
        if available < train + validation:
            train, validation = _divided(available, train, validation)
        parts = prompts.split(train, validation, seed=settings.seed)
        samples[f"train_{kind}"], samples[f"validation_{kind}"] = (part.prompts for part in parts)
    return samples


def _divided(total: int, train: int, validation: int) -> tuple[int, int]:
    """Divide a total in the proportion of two sizes, at least two for validation."""
    second = min(total - 1, max(2, round(total * validation / (train + validation))))
    return total - second, second


def filtered_prompts(
    reader: NextTokenReader,
    samples: DirectionPrompts,
    openers: RefusalOpeners,
    settings: DirectionSettings,
    progress: Progress,
) -> DirectionPrompts:
    """Keep harmful prompts with refusal score > 0 and harmless ones with score < 0.

    Train and validation sets alike. Where that leaves fewer than 2 in one part but 4 in both together, what
    passed is divided anew. With `contrast="answered"` the harmful prompts with score < 0 are kept too, by that name.
    """
    if not settings.filter_prompts:
        return samples
    kinds = ["harmful", "harmless", *["answered"] * (settings.contrast == "answered")]
    used: DirectionPrompts = {}
    for done, (name, prompts) in enumerate(samples.items(), start=1):
        scores = refusal_scores(reader, prompts, openers.ids).tolist()
        refused = tuple(prompt for prompt, score in zip(prompts, scores, strict=True) if score > 0)
        answered = tuple(prompt for prompt, score in zip(prompts, scores, strict=True) if score < 0)
        part, kind = name.split("_")
        used[name] = refused if kind == "harmful" else answered
        if kind == "harmful" and "answered" in kinds:
            used[f"{part}_answered"] = answered
        progress("filter", done, len(samples))
    for kind in kinds:
        train, validation = f"train_{kind}", f"validation_{kind}"
        passed = used[train] + used[validation]
        sampled = "harmful" if kind == "answered" else kind
        sizes = len(samples[f"train_{sampled}"]), len(samples[f"validation_{sampled}"])
        if len(passed) < _FEWEST_FILTERED:
            raise SafeSteerError(_too_few(kind, len(passed), sum(sizes), openers))
        if min(len(used[train]), len(used[validation])) < 2:
            first, _ = _divided(len(passed), *sizes)
            used[train], used[validation] = passed[:first], passed[first:]
    return used


def _too_few(kind: str, passed: int, total: int, openers: RefusalOpeners) -> str:
    texts = ", ".join(map(repr, openers.texts))
    if kind == "harmful":
        return (
            f"{passed} of {total} harmful prompts passed the filter (refusal score > 0: more likely than not "
            f"the response opens with {texts}), so the model refuses too few of them to show a direction, "
            f"and at least {_FEWEST_FILTERED} are needed; give harmful prompts that it refuses, check the "
            "openers (--refusal-token-ids), or switch the filter off (direction.filter_prompts: false) to "
            "average over prompts that it answers too."
        )
    if kind == "answered":
        return (
            f"{passed} of {total} harmful prompts are answered, and at least {_FEWEST_FILTERED} are needed to contrast "
            "refused ones with; give more harmful prompts, or take --contrast harmless."
        )
    return (
        f"{passed} of {total} harmless prompts passed the filter (refusal score < 0), so the model opens its "
        f"responses to nearly all of them with {texts} too, and at least {_FEWEST_FILTERED} are needed; give "
        "harmless prompts that it answers, or check the openers (--refusal-token-ids)."
    )
