"""The refusal direction of a model, found, saved and loaded (method §1; Arditi et al. 2024).

`find_refusal_direction` is the stage; its rooms are `openers` (which tokens open a refusal),
`direction_scores` (what a candidate does to the model), `direction_selection` (which one is taken) and
`direction_strength` (how strongly it is added).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safesteer.artifacts import fingerprint, read_json, read_tensors, write_json, write_tensors
from safesteer.chat import Chat
from safesteer.direction_prompts import DirectionPrompts, filtered_prompts, sampled_prompts
from safesteer.direction_scores import Candidate, CandidateScorer, mean_layer_inputs, refusal_score
from safesteer.direction_selection import CandidateScore, select_candidate
from safesteer.direction_settings import DirectionSettings
from safesteer.direction_strength import CoefficientTrial, choose_coefficient
from safesteer.errors import SafeSteerError, one_line
from safesteer.modeling import decoder_layers, model_fingerprint
from safesteer.next_token import NextTokenReader, Progress, evaluating, no_progress
from safesteer.openers import RefusalOpeners, detect_refusal_openers, openers_from_ids
from safesteer.prompts import PromptSet
from safesteer.steering import Steering

__all__ = [
    "CandidateScore",
    "CoefficientTrial",
    "DirectionSettings",
    "RefusalDirection",
    "direction_fingerprint",
    "find_refusal_direction",
    "refusal_score",
]

# A difference of means this much shorter than the means is rounding: where the residual stream holds nothing
# but the template's own tokens (layer 0), it is the same after every prompt.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class RefusalDirection:
    """The refusal direction of one model, and how it was found.

    Attributes:
        vector: `r`, the unnormalised difference of means, [H] float32.
        layer: At whose input it was read and is added.
        position: Where it was read, counted from the end: −1 is the last token of the prompt.
        coefficient: `c`.
        openers: The tokens that the refusal score is made of.
        candidates: Every candidate and its scores.
        flip_rate: Share of answered harmful validation prompts that the steered model refuses; NaN if the
            unsteered one answers nothing.
        filtered: How many prompts of each set ("train_harmful", …) were used, after the filter.
        relaxed: What the selection had to relax; None if nothing (see `select_candidate` for the rule).
        fingerprint: Of everything that the search depends on (see `direction_fingerprint`).
        model_fingerprint: Of the model it was found on.
        sampled: How many prompts of each set there were before the filter.
        coefficient_trials: Every coefficient tried.
        flip_prompts: Which prompts the flip rate is of: "harmful", or "harmless" if the model answered no
            harmful one.
        flip_answered: How many of them the unsteered model answered.
        validation_harmless: The harmless validation prompts that passed the filter; safety tokens are counted
            on them (method §3).
        at: The post-instruction tokens, if it is added only there (see `Steering`).
    """

    vector: Tensor
    layer: int
    position: int
    coefficient: float
    openers: RefusalOpeners
    candidates: tuple[CandidateScore, ...]
    flip_rate: float
    filtered: Mapping[str, int]
    relaxed: str | None
    fingerprint: str
    model_fingerprint: str
    sampled: Mapping[str, int] = field(default_factory=dict)
    coefficient_trials: tuple[CoefficientTrial, ...] = ()
    flip_prompts: str = "harmful"
    flip_answered: int = 0
    validation_harmless: tuple[str, ...] = ()
    at: tuple[int, ...] = ()

    @property
    def steering(self) -> Steering:
        """What turns the base model into the safety teacher (method §2)."""
        return Steering(self.vector, self.layer, self.coefficient, self.at)

    def require_model(self, model_fingerprint: str) -> None:
        """Check that the direction belongs to a model.

        Raises:
            SafeSteerError: If it was found on another.
        """
        if model_fingerprint != self.model_fingerprint:
            raise SafeSteerError(
                "the refusal direction was found on another model (fingerprint "
                f"{self.model_fingerprint[:12]}, this one has {model_fingerprint[:12]}); find the direction "
                "of this model, in a run folder of its own."
            )

    def save(self, folder: str | Path) -> None:
        """Write `direction.safetensors` and `direction.json`."""
        folder = Path(folder)
        record = {name: value for name, value in vars(self).items() if name != "vector"}
        write_tensors(
            folder / "direction.safetensors", {"vector": self.vector}, {"fingerprint": self.fingerprint}
        )
        write_json(folder / "direction.json", record)

    @classmethod
    def load(cls, folder: str | Path) -> "RefusalDirection":
        """Read what `save` wrote.

        Raises:
            SafeSteerError: If a file is missing or damaged, or the two are not from the same search.
        """
        folder = Path(folder)
        record = read_json(folder / "direction.json")
        tensors, metadata = read_tensors(folder / "direction.safetensors")
        try:
            direction = cls._parse(record, tensors["vector"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SafeSteerError(
                f"{folder / 'direction.json'}: is not a whole refusal direction ({type(error).__name__}: "
                f"{one_line(error)}); delete it and find the direction again."
            ) from error
        if metadata.get("fingerprint") != direction.fingerprint:
            raise SafeSteerError(
                f"{folder}: direction.json and direction.safetensors are of different searches; delete both "
                "and find the direction again."
            )
        return direction

    @classmethod
    def _parse(cls, record: dict[str, Any], vector: Tensor) -> "RefusalDirection":
        if vector.dim() != 1 or vector.dtype != torch.float32 or not torch.isfinite(vector).all():
            raise ValueError(f"the vector is {list(vector.shape)} {vector.dtype}, not finite float32 [H]")
        openers = RefusalOpeners(**{name: tuple(values) for name, values in record["openers"].items()})
        candidates = tuple(CandidateScore(**_with_nan(score)) for score in record["candidates"])
        trials = tuple(CoefficientTrial(**trial) for trial in record["coefficient_trials"])
        known = {
            **record,
            "openers": openers,
            "candidates": candidates,
            "coefficient_trials": trials,
            "flip_rate": _with_nan({"flip_rate": record["flip_rate"]})["flip_rate"],
            "layer": int(record["layer"]),
            "position": int(record["position"]),
            "coefficient": float(record["coefficient"]),
            "validation_harmless": tuple(record["validation_harmless"]),
            "at": tuple(record.get("at", ())),
        }
        return cls(vector=vector, **known)


def _with_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what JSON, which has no NaN, made of it."""
    return {name: math.nan if value is None else value for name, value in record.items()}


def direction_fingerprint(
    model: str, chat: Chat, harmful: PromptSet, harmless: PromptSet, settings: DirectionSettings
) -> str:
    """Hash all that the search for a direction depends on, so that a saved one is found to match or not.

    Args:
        model: The model's fingerprint.
        chat: How it is asked.
        harmful: Before sampling.
        harmless: Before sampling.
        settings: Of the search.
    """
    return fingerprint(
        {
            "stage": "direction",
            "model": model,
            "chat": chat.fingerprint,
            "harmful": harmful.fingerprint,
            "harmless": harmless.fingerprint,
            "settings": settings,
        }
    )


def find_refusal_direction(
    model: PreTrainedModel,
    chat: Chat,
    harmful: PromptSet,
    harmless: PromptSet,
    settings: DirectionSettings | None = None,
    *,
    layer_path: str | None = None,
    progress: Progress | None = None,
) -> RefusalDirection:
    """Find a model's refusal direction (method §1) and how strongly to add it (§6.5).

    Prompts are sampled; openers detected unless given; prompts filtered by refusal score; `r[i,l]`, the
    difference of mean residual-stream inputs over harmful − harmless prompts (or refused − answered harmful ones:
    `contrast`), taken for every
    post-instruction position `i` and layer `l < int(0.8·L)`; one of them selected by its effect on the
    validation prompts (`select_candidate` states the rule and its fallback); and a coefficient chosen by flip
    rate (`choose_coefficient`).

    Args:
        model: A causal language model. It is left as it was, training flags and random state included.
        chat: How it is asked.
        harmful: With fewer prompts than the settings ask for, all are used, divided in the settings'
            proportion.
        harmless: The same.
        settings: The method's by default.
        layer_path: Where the decoder layers are, if they cannot be found (see `decoder_layers`).
        progress: Told what is being done.

    Raises:
        SafeSteerError: If a set has fewer than 8 prompts or fewer than 4 pass the filter, no openers are
            found, or no candidate passes (and none may by the fallback).
    """
    settings = settings or DirectionSettings()
    progress = progress or no_progress
    layers = list(decoder_layers(model, layer_path))
    at = chat.post_instruction_ids if settings.positions == "post_instruction" else ()
    samples = sampled_prompts(harmful, harmless, settings)
    with evaluating(model):
        openers = _openers(model, chat, samples, settings, progress)
        reader = NextTokenReader(model, chat, settings.batch_size)
        used = filtered_prompts(reader, samples, openers, settings, progress)
        vectors, discarded = _candidates(reader, layers, used, settings, progress)
        scorer = CandidateScorer(
            reader,
            layers,
            openers.ids,
            used["validation_harmful"],
            used["validation_harmless"],
            used[f"validation_{settings.contrast}"],
            at,
        )
        selection = select_candidate(
            scorer,
            vectors,
            discarded,
            max_kl=settings.max_kl,
            min_induction=settings.min_induction,
            criterion=settings.criterion,
            coefficient=settings.coefficient or 1.0,
            relax=settings.fallback == "relax",
            progress=progress,
        )
        layer, position = selection.chosen
        strength = choose_coefficient(
            model,
            chat,
            Steering(vectors[selection.chosen], layer, at=at),
            samples["validation_harmful"],
            samples["validation_harmless"],
            settings.coefficients if settings.coefficient is None else (settings.coefficient,),
            target_flip_rate=settings.target_flip_rate,
            layer_path=layer_path,
            batch_size=settings.batch_size,
            progress=progress,
        )
    of_model = model_fingerprint(model)
    return RefusalDirection(
        vector=vectors[selection.chosen],
        layer=layer,
        position=position,
        coefficient=strength.coefficient,
        openers=openers,
        candidates=selection.scores,
        flip_rate=strength.flip_rate,
        filtered={name: len(prompts) for name, prompts in used.items()},
        relaxed=selection.relaxed,
        fingerprint=direction_fingerprint(of_model, chat, harmful, harmless, settings),
        model_fingerprint=of_model,
        sampled={name: len(prompts) for name, prompts in samples.items()},
        coefficient_trials=strength.trials,
        flip_prompts=strength.prompts,
        flip_answered=strength.answered,
        validation_harmless=used["validation_harmless"],
        at=at,
    )


def _openers(
    model: PreTrainedModel,
    chat: Chat,
    samples: DirectionPrompts,
    settings: DirectionSettings,
    progress: Progress,
) -> RefusalOpeners:
    if settings.refusal_token_ids is not None:
        return openers_from_ids(chat.tokenizer, settings.refusal_token_ids)
    return detect_refusal_openers(
        model,
        chat,
        samples["train_harmful"],
        samples["train_harmless"],
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )


def _candidates(
    reader: NextTokenReader,
    layers: Sequence[torch.nn.Module],
    used: DirectionPrompts,
    settings: DirectionSettings,
    progress: Progress,
) -> tuple[dict[Candidate, Tensor], dict[Candidate, str]]:
    """Take the differences of means.

    Returns:
        `r[i,l]`, [H] float32 on the CPU, of the candidates worth scoring; and why the others are not.
    """
    positions = len(reader.chat.post_instruction_ids)
    kept = int(settings.prune_layers_above * len(layers))
    if kept == 0:
        raise SafeSteerError(
            f"direction.prune_layers_above {settings.prune_layers_above:g} leaves none of the model's "
            f"{len(layers)} layers; give a larger share."
        )
    progress("activations", 0, 2)
    mean_harmful = mean_layer_inputs(reader, layers[:kept], used["train_harmful"], positions)
    progress("activations", 1, 2)
    mean_harmless = mean_layer_inputs(reader, layers[:kept], used[f"train_{settings.contrast}"], positions)
    progress("activations", 2, 2)
    vectors: dict[Candidate, Tensor] = {}
    discarded: dict[Candidate, str] = {}
    for layer in range(len(layers)):
        for position in range(-positions, 0):
            if layer >= kept:
                discarded[layer, position] = f"layer ≥ {settings.prune_layers_above:g} L"
                continue
            harmful, harmless = mean_harmful[layer, position], mean_harmless[layer, position]
            difference = harmful - harmless
            if not torch.isfinite(difference).all():
                discarded[layer, position] = "not a number"
            elif difference.norm() <= _ROUNDING * max(harmful.norm(), harmless.norm()):
                discarded[layer, position] = "no difference between harmful and harmless"
            else:
                vectors[layer, position] = difference.float()
    return vectors, discarded
