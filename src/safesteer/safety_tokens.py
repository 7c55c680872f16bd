"""Safety tokens: the vocabulary on which the safety teacher differs most from the base model (method §3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safesteer.artifacts import fingerprint, read_json, write_json
from safesteer.chat import Chat
from safesteer.errors import SafeSteerError, one_line
from safesteer.modeling import Head, model_fingerprint
from safesteer.next_token import Batch, NextTokenReader, Progress, evaluating, float64, no_progress
from safesteer.safety_token_settings import SafetyTokenSettings
from safesteer.steering import Steering

__all__ = [
    "SafetyToken",
    "SafetyTokenSettings",
    "SafetyTokens",
    "find_safety_tokens",
    "safety_tokens_fingerprint",
    "select_safety_tokens",
    "steering_fingerprint",
]


@dataclass(frozen=True)
class SafetyToken:
    """One token of `S` and what it was chosen for.

    Attributes:
        id: Token id.
        text: What it decodes to.
        votes: How many positions voted for it.
        teacher_probability: Mean over the counted positions, under the steered model.
        base_probability: The same under the base model.
        mean_delta: Mean of `Δ = log πt − log π0`, nats.
    """

    id: int
    text: str
    votes: int
    teacher_probability: float
    base_probability: float
    mean_delta: float


@dataclass(frozen=True)
class SafetyTokens:
    """The set `S` that the loss is restricted to, best first.

    Attributes:
        tokens: At most `settings.size`.
        counted_positions: How many positions voted.
        settings: They were found with.
        fingerprint: Of everything they depend on (see `safety_tokens_fingerprint`).
        model_fingerprint: Of the model they were found on.
        steering_fingerprint: Of the teacher's steering; empty where an earlier version did not note it.
    """

    tokens: tuple[SafetyToken, ...]
    counted_positions: int
    settings: SafetyTokenSettings
    fingerprint: str
    model_fingerprint: str
    steering_fingerprint: str = ""

    @property
    def ids(self) -> list[int]:
        """The token ids, best first."""
        return [token.id for token in self.tokens]

    def require_model(self, model_fingerprint: str) -> None:
        """Check that the tokens belong to a model.

        Raises:
            SafeSteerError: If they were found on another.
        """
        if model_fingerprint != self.model_fingerprint:
            raise SafeSteerError(
                "the safety tokens were found on another model (fingerprint "
                f"{self.model_fingerprint[:12]}, this one has {model_fingerprint[:12]}); find the tokens of "
                "this model, in a run folder of its own."
            )

    def save(self, folder: str | Path) -> None:
        """Write `safety_tokens.json`."""
        write_json(Path(folder) / "safety_tokens.json", self)

    @classmethod
    def load(cls, folder: str | Path) -> "SafetyTokens":
        """Read what `save` wrote.

        Raises:
            SafeSteerError: If the file is missing or damaged.
        """
        path = Path(folder) / "safety_tokens.json"
        record = read_json(path)
        try:
            tokens = tuple(SafetyToken(**token) for token in record["tokens"])
            if not tokens or not all(isinstance(token.id, int) for token in tokens):
                raise ValueError("no token, or one without an id")
            return cls(**{**record, "tokens": tokens, "settings": SafetyTokenSettings(**record["settings"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SafeSteerError(
                f"{path}: is not a whole set of safety tokens ({type(error).__name__}: {one_line(error)}); "
                "delete it and find the tokens again."
            ) from error


def safety_tokens_fingerprint(
    model: str, chat: Chat, prompts: Sequence[str], steering: Steering, settings: SafetyTokenSettings
) -> str:
    """Hash all that the safety tokens depend on, so that saved ones are found to match or not.

    Args:
        model: The model's fingerprint.
        chat: How it is asked.
        prompts: Harmless prompts.
        steering: The teacher's.
        settings: Of the count.
    """
    return fingerprint(
        {
            "stage": "safety tokens",
            "model": model,
            "chat": chat.fingerprint,
            "prompts": tuple(prompts),
            "steering": _on_cpu(steering),
            "settings": settings,
        }
    )


def steering_fingerprint(steering: Steering) -> str:
    """Hash a teacher's steering, so that tokens of another one are found out."""
    return fingerprint(_on_cpu(steering))


def _on_cpu(steering: Steering) -> Steering:
    return replace(steering, vector=steering.vector.detach().float().cpu())


def find_safety_tokens(
    model: PreTrainedModel,
    chat: Chat,
    prompts: Sequence[str],
    steering: Steering,
    settings: SafetyTokenSettings | None = None,
    *,
    layer_path: str | None = None,
    progress: Progress | None = None,
) -> SafetyTokens:
    """Find the tokens that the safety teacher's responses to harmless prompts differ in (method §3).

    `N` trajectories of `H − 1` tokens per prompt are sampled from the steered model, past any end of turn,
    and scored by it and by the base model: `Δ[t,v] = log πt(v|x,y<t) − log π0(v|x,y<t)`. Positions count
    until the first step at which the base model's likeliest token ends the turn. Special tokens are banned,
    and those below the minimum mean probability; every counted position votes for its `K′` tokens of highest
    `Δ`.

    Only hidden states are kept, [N·H, d] each, and [V] sums; never a [N, H, V] tensor. The ban depends on all
    positions, so the head is applied twice: first for the means, then for the votes.

    Args:
        model: A causal language model. It is left as it was, training flags and random state included.
        chat: How it is asked.
        prompts: Harmless prompts: the filtered validation ones, `RefusalDirection.validation_harmless`.
        steering: What turns the model into the teacher.
        settings: The method's by default.
        layer_path: Where the decoder layers are, if they cannot be found (see `decoder_layers`).
        progress: Told how many trajectories have been sampled and how many positions have voted.

    Raises:
        SafeSteerError: If there are no prompts, no position counts, or no token survives.
    """
    settings = settings or SafetyTokenSettings()
    progress = progress or no_progress
    if not prompts:
        raise SafeSteerError(
            "safety tokens need harmless prompts and got none; give some that the model answers."
        )
    repeated = [prompt for prompt in prompts for _ in range(settings.samples)]
    reader = NextTokenReader(model, chat, settings.batch_size)
    means = _Means(reader.head.weight.shape[0])
    kept: list[tuple[Tensor, Tensor]] = []
    sampled = 0
    with evaluating(model):
        for batch in reader.batches(repeated, passes=settings.horizon):
            teacher_BHd, base_BHd = _trajectories(reader, batch, steering, settings, layer_path)
            counts = torch.ones(len(batch.rows), dtype=torch.bool, device=base_BHd.device)
            for t in range(settings.horizon):
                base_BV = reader.head.logits(base_BHd[:, t])
                counts &= ~torch.isin(base_BV.argmax(-1), torch.tensor(reader.end_ids, device=base_BV.device))
                if counts.any():
                    teacher_Nd = teacher_BHd[counts, t]
                    means.add(reader.head.logits(teacher_Nd), base_BV[counts])
                    kept.append((teacher_Nd.cpu(), base_BHd[counts, t].cpu()))
            sampled += len(batch.rows)
            progress("teacher trajectories", sampled, len(repeated))
        if means.positions == 0:
            raise SafeSteerError(
                f"the model ends its turn at once after each of the {len(prompts)} harmless prompts, so no "
                "position can vote for safety tokens; check the chat template (--chat-template) and the "
                "prompts."
            )
        banned = _special_tokens(chat.tokenizer, reader.end_ids, means.size)
        banned |= means.teacher_probability < settings.minimum_probability
        votes = torch.zeros(means.size, dtype=torch.int64)
        voted = 0
        for teacher_Nd, base_Nd in kept:
            votes += _votes(reader.head, teacher_Nd, base_Nd, banned, settings.votes_per_position)
            voted += len(teacher_Nd)
            progress("votes", voted, means.positions)
    chosen = select_safety_tokens(
        votes, means.delta, banned, size=settings.size, selection=settings.selection
    )
    if not chosen:
        raise SafeSteerError(
            "no safety token is left: the teacher gives no ordinary token a mean probability of "
            f"{settings.minimum_probability:g} or more; lower --tokens-minimum-probability."
        )
    of_model = model_fingerprint(model)
    return SafetyTokens(
        tokens=tuple(
            SafetyToken(
                id=token,
                text=str(chat.tokenizer.decode([token])),
                votes=int(votes[token]),
                teacher_probability=means.teacher_probability[token].item(),
                base_probability=means.base_probability[token].item(),
                mean_delta=means.delta[token].item(),
            )
            for token in chosen
        ),
        counted_positions=means.positions,
        settings=settings,
        fingerprint=safety_tokens_fingerprint(of_model, chat, prompts, steering, settings),
        model_fingerprint=of_model,
        steering_fingerprint=steering_fingerprint(steering),
    )


def select_safety_tokens(
    votes: Tensor, mean_delta: Tensor, banned: Tensor, *, size: int, selection: Literal["vote", "mean"]
) -> list[int]:
    """Choose `S`: the tokens with most votes (of equals the higher mean `Δ`), or with the highest mean `Δ`.

    Args:
        votes: [V] int64.
        mean_delta: [V].
        banned: [V] bool.
        size: `K`; fewer are chosen if fewer are allowed, and by vote, if fewer have any.
        selection: "vote" or "mean".

    Returns:
        Token ids, best first.
    """
    allowed = ~banned & (votes > 0) if selection == "vote" else ~banned
    delta, count = mean_delta.tolist(), votes.tolist()

    def rank(token: int) -> tuple[float, float, int]:
        return (-count[token] if selection == "vote" else 0, -delta[token], token)

    return sorted(allowed.nonzero().flatten().tolist(), key=rank)[:size]


class _Means:
    """Running means over counted positions of both models' probabilities and of `Δ`: [V] float64."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.positions = 0
        self._sums = torch.zeros(3, size, dtype=torch.float64)

    def add(self, teacher_NV: Tensor, base_NV: Tensor) -> None:
        """Count positions in, by their logits."""
        log_teacher, log_base = (float64(logits).log_softmax(-1) for logits in (teacher_NV, base_NV))
        self._sums[0] += log_teacher.exp().sum(0).cpu()
        self._sums[1] += log_base.exp().sum(0).cpu()
        self._sums[2] += _delta(log_teacher, log_base).sum(0).cpu()
        self.positions += len(teacher_NV)

    @property
    def teacher_probability(self) -> Tensor:
        return self._sums[0] / self.positions

    @property
    def base_probability(self) -> Tensor:
        return self._sums[1] / self.positions

    @property
    def delta(self) -> Tensor:
        return self._sums[2] / self.positions


def _trajectories(
    reader: NextTokenReader,
    batch: Batch,
    steering: Steering,
    settings: SafetyTokenSettings,
    layer_path: str | None,
) -> tuple[Tensor, Tensor]:
    """Sample `H − 1` tokens from the teacher and score them with both models.

    Returns:
        Hidden states of the teacher and of the base model at the `H` positions that predict these tokens and
        the one after them, [B, H, d] each.
    """
    horizon = settings.horizon
    with steering.applied(reader.model, layer_path):
        if horizon > 1:
            response = reader.sample(batch, horizon - 1, seed=settings.seed)
            batch = replace(
                batch,
                input_ids=torch.cat([batch.input_ids, response], dim=1),
                mask=torch.cat([batch.mask, torch.ones_like(response)], dim=1),
            )
        teacher_BHd = reader.hidden(batch, horizon)
    return teacher_BHd, reader.hidden(batch, horizon)


def _delta(log_teacher: Tensor, log_base: Tensor) -> Tensor:
    """`Δ = log πt − log π0`, and −∞ for a token that either model rules out."""
    # −∞ already where the teacher alone does so; +∞, or NaN where both do, where the base does.
    return (log_teacher - log_base).masked_fill(log_base.isneginf(), -math.inf)


def _votes(head: Head, teacher_Nd: Tensor, base_Nd: Tensor, banned: Tensor, per_position: int) -> Tensor:
    """Count the positions that have a token among their `per_position` allowed ones of highest `Δ`.

    Returns:
        [V] int64.
    """
    # A position's Δ is the difference of its logits but for a constant, which ranks nothing.
    device = head.weight.device
    delta_NV = _delta(*(float64(head.logits(hidden.to(device))) for hidden in (teacher_Nd, base_Nd)))
    delta_NV = delta_NV.masked_fill(banned.to(delta_NV.device), -math.inf)
    best = delta_NV.topk(min(per_position, delta_NV.shape[-1]), dim=-1)
    return torch.bincount(best.indices[best.values > -math.inf].cpu(), minlength=len(banned))


def _special_tokens(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], size: int) -> Tensor:
    """Mark the tokens that are not text: special and end-of-turn ones, and the padding of the vocabulary.

    Returns:
        [V] bool.
    """
    banned = torch.zeros(size, dtype=torch.bool)
    added = [token for token, content in tokenizer.added_tokens_decoder.items() if content.special]
    ids = {*tokenizer.all_special_ids, *added, *end_ids}
    banned[[token for token in ids if token < size]] = True
    # Embeddings are often padded to a round number; those rows decode to nothing.
    banned[len(tokenizer) :] = True
    return banned
