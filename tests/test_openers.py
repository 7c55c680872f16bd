"""Refusal openers of a model whose refusals are known."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from planted_model import ANSWERED, HARMLESS, REFUSED, planted_chat, planted_model, token_id
from safesteer.errors import SafeSteerError
from safesteer.openers import detect_refusal_openers, openers_from_ids
from tiny_models import chatml_tokenizer


@torch.no_grad()
def mean_probability(token: int, prompts: tuple[str, ...]) -> float:
    """Reference: the whole model on one prompt at a time."""
    rows = planted_chat().encode(prompts)
    logits = [planted_model()(torch.tensor([row])).logits[0, -1].double() for row in rows]
    return sum(row.softmax(-1)[token].item() for row in logits) / len(rows)


def test_openers_are_what_the_refusals_begin_with() -> None:
    harmful = REFUSED + ANSWERED
    openers = detect_refusal_openers(
        planted_model(), planted_chat(), harmful, HARMLESS, batch_size=15, seed=1, max_new_tokens=5
    )
    assert openers.texts == ("I", "Sorry")
    assert openers.ids == (token_id("I"), token_id("Sorry"))
    for number, token in enumerate(openers.ids):
        assert openers.harmful_probability[number] == pytest.approx(
            mean_probability(token, harmful), abs=1e-6
        )
        assert openers.harmless_probability[number] == pytest.approx(
            mean_probability(token, HARMLESS), abs=1e-6
        )


def test_an_answers_opener_is_none_however_specific_to_harmful_prompts() -> None:
    """ "Write" opens answers to harmful prompts alone; a mere contrast would take it for a refusal's."""
    harmful = REFUSED + ANSWERED
    write = token_id("Write")
    openers = detect_refusal_openers(planted_model(), planted_chat(), harmful, HARMLESS, max_new_tokens=5)
    assert mean_probability(write, harmful) - mean_probability(write, HARMLESS) > 0.3
    assert write not in openers.ids


def test_shares_count_greedy_and_sampled_refusals() -> None:
    """Every greedy refusal opens with "I", and the sampled ones as the probabilities say."""
    openers = detect_refusal_openers(
        planted_model(), planted_chat(), REFUSED * 20, HARMLESS, seed=2, batch_size=240, max_new_tokens=5
    )
    shares = dict(zip(openers.texts, openers.shares, strict=True))
    one, other = (mean_probability(token_id(text), REFUSED) for text in ("I", "Sorry"))
    # 240 greedy refusals, and of 240 samples those that the model begins so; four standard deviations.
    assert shares["I"] == pytest.approx((1 + one) / (1 + one + other), abs=0.07)
    assert shares["Sorry"] == pytest.approx(other / (1 + one + other), abs=0.07)
    assert 0.95 < sum(openers.shares) <= 1.0  # a few refusals begin with noise


def test_a_rare_opener_is_left_out() -> None:
    openers = detect_refusal_openers(
        planted_model(), planted_chat(), REFUSED, HARMLESS, minimum_share=0.6, max_new_tokens=5
    )
    assert openers.texts == ("I",)


def test_it_is_reproducible_and_tells_its_progress() -> None:
    told: Counter[tuple[str, int, int]] = Counter()

    def detect() -> object:
        return detect_refusal_openers(
            planted_model(),
            planted_chat(),
            REFUSED,
            HARMLESS,
            batch_size=5,
            seed=4,
            max_new_tokens=5,
            progress=lambda *progress: told.update([progress]),
        )

    first = detect()
    torch.rand(1)
    assert detect() == first
    # Two rows first: with the longest prompt among five, more of the others would be padded.
    assert told == Counter({("refusal openers", done, 12): 2 for done in (2, 7, 12)})


def test_a_model_that_never_refuses() -> None:
    with pytest.raises(
        SafeSteerError, match=r"none of the 16 responses to the 8 harmful prompts was a refusal"
    ):
        detect_refusal_openers(planted_model(), planted_chat(), ANSWERED, HARMLESS)


def test_a_model_that_refuses_harmless_prompts_alike() -> None:
    with pytest.raises(
        SafeSteerError, match=r"of 24 responses .* were refusals, but .*'I'.*--refusal-token-ids"
    ):
        detect_refusal_openers(planted_model(), planted_chat(), REFUSED, REFUSED)


@pytest.mark.parametrize(("harmful", "harmless"), [((), HARMLESS), (REFUSED, ())])
def test_no_prompts(harmful: tuple[str, ...], harmless: tuple[str, ...]) -> None:
    with pytest.raises(SafeSteerError, match=f"but got {len(harmful)} and {len(harmless)};"):
        detect_refusal_openers(planted_model(), planted_chat(), harmful, harmless)


def test_openers_given_by_hand() -> None:
    openers = openers_from_ids(chatml_tokenizer(), [token_id("Sorry"), token_id("I"), token_id("Sorry")])
    assert openers.ids == (token_id("Sorry"), token_id("I"))
    assert openers.texts == ("Sorry", "I")
    assert openers == replace(openers, shares=(), harmful_probability=(), harmless_probability=())


@pytest.mark.parametrize(
    ("ids", "said"), [([], "there is no token id"), ([3, 430], "430 is not"), ([-1], "-1 is not")]
)
def test_ids_that_the_tokenizer_does_not_have(ids: list[int], said: str) -> None:
    with pytest.raises(SafeSteerError, match=f"--refusal-token-ids .*{said}.* 0 to 429"):
        openers_from_ids(chatml_tokenizer(), ids)
