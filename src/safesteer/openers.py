"""Refusal openers: the tokens that open this model's refusals (method §1 and §6.5)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safesteer.chat import Chat
from safesteer.errors import SafeSteerError
from safesteer.next_token import NextTokenReader, Progress, evaluating, mean_probabilities, no_progress
from safesteer.refusals import is_refusal


@dataclass(frozen=True)
class RefusalOpeners:
    """The tokens whose next-token mass is the refusal score's `p`, most frequent first.

    Attributes:
        ids: Token ids.
        texts: What they decode to.
        shares: Share of the model's sampled refusals that open with each.
        harmful_probability: Mean next-token probability of each after harmful prompts.
        harmless_probability: The same after harmless prompts.

    The last three are empty when the ids were given by hand, since nothing was measured.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    shares: tuple[float, ...] = ()
    harmful_probability: tuple[float, ...] = ()
    harmless_probability: tuple[float, ...] = ()


def detect_refusal_openers(
    model: PreTrainedModel,
    chat: Chat,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    minimum_share: float = 0.02,
    minimum_contrast: float = 0.005,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> RefusalOpeners:
    """Find what a model says first when it refuses.

    Each harmful prompt is answered twice, greedily and sampled at temperature 1. The responses that
    `is_refusal` matches are kept and their first tokens counted. A token is an opener if it opens enough of
    those refusals and is likelier after harmful prompts than after harmless ones. The contrast alone would
    not do: what opens an *answer* to a harmful prompt may be specific to harmful prompts too.

    Args:
        model: A causal language model.
        chat: How it is asked.
        harmful: Prompts, of which it should refuse some.
        harmless: Prompts that it answers.
        minimum_share: Smallest share of the refusals that an opener opens.
        minimum_contrast: Smallest difference of its mean next-token probabilities, harmful − harmless.
        max_new_tokens: Length of the responses; a refusal shows in its first words.
        batch_size: Prompts at a time.
        seed: Of the sampling.
        progress: Told how many harmful prompts have been answered.

    Raises:
        SafeSteerError: If either set is empty, no response is a refusal, or no first token sets the refusals
            apart.
    """
    if not harmful or not harmless:
        raise SafeSteerError(
            f"refusal openers need harmful and harmless prompts but got {len(harmful)} and {len(harmless)}; "
            "give some of both, or the openers themselves with --refusal-token-ids."
        )
    progress = progress or no_progress
    reader = NextTokenReader(model, chat, batch_size)
    ends = set(reader.end_ids)
    counts: Counter[int] = Counter()
    with evaluating(model):
        done = 0
        for batch in reader.batches(harmful, passes=max_new_tokens):
            for temperature in (0.0, 1.0):
                sampled = reader.sample(batch, max_new_tokens, temperature=temperature, seed=seed)
                for response in sampled.tolist():
                    length = next((t for t, token in enumerate(response) if token in ends), len(response))
                    text = chat.tokenizer.decode(response[:length], skip_special_tokens=True)
                    if is_refusal(str(text)):
                        counts[response[0]] += 1
            done += len(batch.rows)
            progress("refusal openers", done, len(harmful))
        on_harmful = mean_probabilities(reader, harmful)
        on_harmless = mean_probabilities(reader, harmless)
    refusals, responses = counts.total(), 2 * len(harmful)
    if refusals == 0:
        raise SafeSteerError(
            f"none of the {responses} responses to the {len(harmful)} harmful prompts was a refusal, so the "
            "model has no refusals whose opening tokens could be found; give harmful prompts that it "
            "refuses, or, if it refuses in other words than the phrase matcher knows, the tokens that open "
            "them with --refusal-token-ids."
        )
    frequent = [token for token, count in counts.most_common() if count / refusals >= minimum_share]
    openers = [token for token in frequent if on_harmful[token] - on_harmless[token] >= minimum_contrast]
    if not openers:
        opening = ", ".join(repr(_text(chat.tokenizer, token)) for token, _ in counts.most_common(3))
        raise SafeSteerError(
            f"{refusals} of {responses} responses to harmful prompts were refusals, but what opens them "
            f"({opening}) opens at least {minimum_share:.0%} of them and is {minimum_contrast:g} likelier "
            "than after harmless prompts for no token; give harmless prompts that the model answers, turn "
            "thinking off if it is on, or give the tokens that open its refusals with --refusal-token-ids."
        )
    return RefusalOpeners(
        ids=tuple(openers),
        texts=tuple(_text(chat.tokenizer, token) for token in openers),
        shares=tuple(counts[token] / refusals for token in openers),
        harmful_probability=tuple(on_harmful[token].item() for token in openers),
        harmless_probability=tuple(on_harmless[token].item() for token in openers),
    )


def openers_from_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> RefusalOpeners:
    """Take the refusal openers as given, e.g. 40, 2121, 2753, 2132 for Qwen3 (method §1).

    Args:
        tokenizer: The model's.
        ids: Token ids; repeated ones count once.

    Raises:
        SafeSteerError: If there are none, or one is not in the tokenizer's vocabulary.
    """
    unknown = [token for token in ids if not 0 <= token < len(tokenizer)]
    if unknown or not ids:
        raise SafeSteerError(
            f"--refusal-token-ids {','.join(map(str, ids)) or '(none)'}: "
            + (f"{unknown[0]} is not a token id" if unknown else "there is no token id")
            + f" of {tokenizer.name_or_path or 'the tokenizer'}, whose ids run from 0 to "
            f"{len(tokenizer) - 1}; give the ids of the tokens that open this model's refusals, or leave the "
            "setting out to detect them."
        )
    unique = tuple(dict.fromkeys(ids))
    return RefusalOpeners(ids=unique, texts=tuple(_text(tokenizer, token) for token in unique))


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))
