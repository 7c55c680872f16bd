"""What each support is worth as an objective: its sign, its minimum, its order, and what it is blind to.

An identity head makes hidden states logits, so gradients here are with respect to logits.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safesteer.divergence import DivergenceOutput, Support, localized_divergence
from safesteer.modeling import Head

IDS = torch.tensor([0, 1, 2])
BETAS = [0.0, 0.25, 0.5, 1.0]
TRUE_DIVERGENCES: list[tuple[Support, float]] = [
    *(("tail", beta) for beta in BETAS),
    *(("generalized", beta) for beta in BETAS),
    ("truncated", 0.25),
    ("truncated", 0.5),
]
logit = st.floats(-12, 12)


def rows(size: int) -> st.SearchStrategy[Tensor]:
    numbers = st.lists(logit, min_size=size, max_size=size)
    return numbers.map(lambda row: torch.tensor([row], dtype=torch.float64))


pairs = st.integers(4, 9).flatmap(lambda size: st.tuples(rows(size), rows(size)))


def score(student: Tensor, teacher: Tensor, **options: Any) -> DivergenceOutput:
    identity = Head(torch.eye(student.shape[1], dtype=student.dtype))
    weights = torch.ones(len(student), dtype=student.dtype)
    return localized_divergence(
        student, teacher, identity, identity, weights, **({"token_ids": IDS} | options)
    )


def value(student: Tensor, teacher: Tensor, **options: Any) -> float:
    return float(score(student, teacher, **options).per_token[0])


def minimise(teacher: Tensor, **options: Any) -> tuple[Tensor, float]:
    """Minimise over all distributions, starting at the uniform one; return p and the value there."""
    student = torch.zeros_like(teacher, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [student], max_iter=300, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        output = score(student, teacher, **options, statistics=False)
        output.loss.backward()
        return float(output.loss.detach())

    optimizer.step(loss)
    return student.detach().softmax(-1)[0], value(student.detach(), teacher, **options)


TEACHER = torch.tensor([[2.0, 1.0, 0.5, 0.3, 0.0, -0.4]], dtype=torch.float64)
Q = TEACHER.softmax(-1)[0]
ON_Q = Q[IDS]
MASS = float(ON_Q.sum())


def test_the_truncated_sum_is_least_at_q_over_e() -> None:
    p, least = minimise(TEACHER, support="truncated")
    torch.testing.assert_close(p[IDS], ON_Q / math.e, rtol=1e-6, atol=0)
    assert least == pytest.approx(-MASS / math.e, rel=1e-10)


def test_the_forward_truncated_sum_moves_all_mass_onto_s() -> None:
    p, least = minimise(TEACHER, support="truncated", beta=0.0)
    torch.testing.assert_close(p[IDS], ON_Q / MASS, rtol=1e-4, atol=0)
    assert least == pytest.approx(MASS * math.log(MASS), rel=1e-4)


@pytest.mark.parametrize(("support", "beta"), TRUE_DIVERGENCES)
def test_a_divergence_is_least_at_the_teacher(support: Support, beta: float) -> None:
    p, least = minimise(TEACHER, support=support, beta=beta)
    torch.testing.assert_close(p[IDS], ON_Q, rtol=1e-5, atol=0)
    assert least == pytest.approx(0, abs=1e-10)


def test_the_renormalized_divergence_is_least_at_the_teachers_proportions_whatever_their_mass() -> None:
    p, least = minimise(TEACHER, support="renormalized")
    torch.testing.assert_close(p[IDS] / p[IDS].sum(), ON_Q / MASS, rtol=1e-5, atol=0)
    assert least == pytest.approx(0, abs=1e-10)
    # Started from uniform, the mass of S is where the gradient left it, not at the teacher's.
    assert abs(float(p[IDS].sum()) - MASS) > 0.1


def test_the_truncated_gradient_pushes_a_perfect_student_down() -> None:
    """`∂L/∂z` at p = q is `q (1 − Q)` on S and `−q Q` off it (docs/notes/truncated-sum.md)."""
    student = TEACHER.clone().requires_grad_()
    score(student, TEACHER, support="truncated").loss.backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad[0, :3], ON_Q * (1 - MASS), rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad[0, 3:], -Q[3:] * MASS, rtol=1e-10, atol=0)


@settings(deadline=None)
@given(pair=pairs, which=st.sampled_from(TRUE_DIVERGENCES))
def test_divergences_are_never_negative(pair: tuple[Tensor, Tensor], which: tuple[Support, float]) -> None:
    assert value(*pair, support=which[0], beta=which[1]) >= -1e-12


@settings(deadline=None)
@given(pair=pairs, which=st.sampled_from(TRUE_DIVERGENCES), shift=logit)
def test_zero_when_equal_on_s_whatever_the_rest(
    pair: tuple[Tensor, Tensor], which: tuple[Support, float], shift: float
) -> None:
    """The student shares the teacher's logits on S and its log-sum-exp off S, but not the shape off S."""
    student, teacher = pair
    rest = student[:, 3:] + teacher[:, 3:].logsumexp(-1) - student[:, 3:].logsumexp(-1)
    student = torch.cat([teacher[:, :3], rest], dim=-1) + shift
    assert value(student, teacher, support=which[0], beta=which[1]) == pytest.approx(0, abs=1e-12)


@settings(deadline=None)
@given(pair=pairs, which=st.sampled_from(TRUE_DIVERGENCES))
def test_zero_only_when_equal_on_s(pair: tuple[Tensor, Tensor], which: tuple[Support, float]) -> None:
    """By Pinsker's inequality tail at β = 0 and 1 is at least `distance² / 2`; the others are above zero."""
    student, teacher = pair
    distance = float((student.softmax(-1) - teacher.softmax(-1))[0, :3].abs().max())
    actual = value(student, teacher, support=which[0], beta=which[1])
    if which[0] == "tail" and which[1] in (0.0, 1.0):
        assert actual >= distance**2 / 2 - 1e-12
    elif distance > 1e-3:
        assert actual > 1e-8


@settings(deadline=None)
@given(pair=pairs, beta=st.sampled_from(BETAS))
def test_generalized_is_at_most_tail_is_at_most_full(pair: tuple[Tensor, Tensor], beta: float) -> None:
    generalized, tail = (value(*pair, support=s, beta=beta) for s in ("generalized", "tail"))
    full = value(*pair, vocabulary="full", beta=beta)
    assert generalized <= tail + 1e-12
    assert tail <= full + 1e-12


@settings(deadline=None)
@given(pair=pairs)
def test_reverse_kl_splits_into_what_each_support_sees(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    output = score(student, teacher, support="tail")
    p, q = float(output.student_mass[0]), float(output.teacher_mass[0])
    p_rest, q_rest = (float(z.softmax(-1)[0, 3:].sum()) for z in pair)
    mass = p * math.log(p / q) + p_rest * math.log(p_rest / q_rest)
    rest = p_rest * value(student[:, 3:], teacher[:, 3:], vocabulary="full", token_ids=None)
    tail = float(output.per_token[0])
    assert tail == pytest.approx(mass + p * value(*pair, support="renormalized"), rel=1e-9, abs=1e-12)
    assert value(*pair, vocabulary="full") == pytest.approx(tail + rest, rel=1e-9, abs=1e-12)
    generalized = value(*pair, support="generalized")
    assert value(*pair, support="truncated") == pytest.approx(generalized + p - q, rel=1e-9, abs=1e-12)
    assert float(output.kl_on[0] + output.kl_off[0]) == pytest.approx(tail + rest, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(pair=pairs, beta=st.floats(0.01, 0.99))
def test_generalized_equals_truncated_between_the_ends(pair: tuple[Tensor, Tensor], beta: float) -> None:
    truncated, generalized = (value(*pair, support=s, beta=beta) for s in ("truncated", "generalized"))
    assert truncated == generalized


@settings(deadline=None)
@given(
    pair=pairs,
    support=st.sampled_from(["truncated", "tail", "generalized", "renormalized"]),
    beta=st.sampled_from(BETAS),
    shifts=st.tuples(logit, logit),
)
def test_only_probabilities_count_and_the_gradient_moves_none_of_the_total(
    pair: tuple[Tensor, Tensor], support: Support, beta: float, shifts: tuple[float, float]
) -> None:
    """Logits plus a constant are the same distribution, so the value stays and the gradient sums to zero.

    Naming S in another order changes nothing either.
    """
    student, teacher = pair[0].clone().requires_grad_(), pair[1]
    output = score(student, teacher, support=support, beta=beta)
    output.loss.backward()
    assert student.grad is not None
    assert float(student.grad.sum()) == pytest.approx(0, abs=1e-10)
    moved = value(pair[0] + shifts[0], teacher + shifts[1], support=support, beta=beta, token_ids=IDS.flip(0))
    assert moved == pytest.approx(float(output.per_token[0]), rel=1e-9, abs=1e-11)
