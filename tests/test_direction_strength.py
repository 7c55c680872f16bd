"""The coefficient search on a model in which the strength that flips its answers is known."""

import pytest
import torch
from torch import Tensor

from planted_model import ANSWERED, HARMLESS, REFUSE, REFUSED, planted_chat, planted_model
from safesteer.direction_strength import Strength, choose_coefficient, is_degenerate
from safesteer.next_token import no_progress
from safesteer.steering import Steering


def along_refuse(length: float) -> Tensor:
    return length * torch.eye(32)[REFUSE]


def search(
    vector: Tensor,
    coefficients: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0),
    *,
    harmful: tuple[str, ...] = REFUSED[:3] + ANSWERED,
    harmless: tuple[str, ...] = HARMLESS[:4],
    target: float = 0.9,
) -> Strength:
    return choose_coefficient(
        planted_model(),
        planted_chat(),
        Steering(vector, 1),
        harmful,
        harmless,
        coefficients,
        target_flip_rate=target,
        layer_path=None,
        batch_size=16,
        progress=no_progress,
    )


def test_the_first_coefficient_that_flips_enough_is_taken() -> None:
    """An answered prompt's 19 tokens put 8.5·√32/19 = 2.53 on WRITE; steering must exceed it: 2·1.3 does."""
    strength = search(along_refuse(1.3), (3.0, 2.0, 1.5, 1.0))
    assert strength.coefficient == 2.0
    assert [(trial.coefficient, trial.flip_rate) for trial in strength.trials] == [
        (1.0, 0.0),
        (1.5, 0.0),
        (2.0, 1.0),
    ]
    assert (strength.flip_rate, strength.prompts, strength.answered) == (1.0, "harmful", 8)


def test_a_fixed_coefficient_is_measured_all_the_same() -> None:
    strength = search(along_refuse(1.3), (1.5,))
    assert (strength.coefficient, strength.flip_rate, len(strength.trials)) == (1.5, 0.0, 1)


def test_it_stops_before_the_model_stops_making_sense() -> None:
    """Far along the axis the model says one opener after another, which is no refusal and no sense."""
    strength = search(along_refuse(0.9), (2.0, 8.0, 9.0))
    assert [trial.coefficient for trial in strength.trials] == [2.0, 8.0]
    assert strength.trials[0].degenerate_share == 0.0
    assert strength.trials[1].degenerate_share == 1.0
    assert (strength.coefficient, strength.flip_rate) == (2.0, 0.0)


def test_of_equal_flip_rates_the_smallest_coefficient_is_kept() -> None:
    strength = search(torch.zeros(32), (0.5, 1.0))
    assert (strength.coefficient, strength.flip_rate, len(strength.trials)) == (0.5, 0.0, 2)


def test_harmless_prompts_are_flipped_when_every_harmful_one_is_refused() -> None:
    strength = search(along_refuse(1.3), harmful=REFUSED[:3])
    assert (strength.prompts, strength.answered) == ("harmless", 4)
    assert (strength.coefficient, strength.flip_rate) == (1.0, 1.0)


def test_a_model_that_refuses_everything_has_no_flip_rate() -> None:
    strength = search(along_refuse(1.3), harmful=REFUSED[:3], harmless=REFUSED[3:5])
    assert strength.flip_rate != strength.flip_rate
    assert (strength.coefficient, strength.trials, strength.answered) == (1.0, (), 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "I I I I I I",
        "no no no no no",
        "Sure: the the the the the the",
        "????????????",
        "不要不要不要不要",
    ],
)
def test_degenerate(text: str) -> None:
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        "ha ha ha, that is a good one: a horse walks into a bar",
        "1000000",
        "Yes!!!",
        "It is what it is, and that is what it will be.",
    ],
)
def test_not_degenerate(text: str) -> None:
    assert not is_degenerate(text)
