"""Small problems for the divergence, and its definitions written plainly."""

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from safesteer.divergence import DivergenceOutput, Support, Vocabulary, localized_divergence
from safesteer.modeling import Head

N, V, H = 7, 23, 5
IDS = torch.tensor([3, 17, 0, 8])
TOP_K = 6
BETAS = (0.0, 0.3, 0.5, 1.0)
SUPPORTS = get_args(Support)
VOCABULARIES = get_args(Vocabulary)


@dataclass
class Case:
    student_hidden: Tensor
    teacher_hidden: Tensor
    student: Head
    teacher: Head
    weights: Tensor
    temperature: float = 1.0

    def score(self, **options: Any) -> DivergenceOutput:
        options = {"token_ids": IDS, "top_k": TOP_K, "chunk_size": 3} | options
        return localized_divergence(
            self.student_hidden,
            self.teacher_hidden,
            self.student,
            self.teacher,
            self.weights,
            temperature=self.temperature,
            **options,
        )

    def trained(self) -> list[Tensor]:
        return [t for t in (self.student_hidden, self.student.weight, self.student.bias) if t is not None]

    def log_probabilities(self) -> tuple[Tensor, Tensor]:
        student, teacher = self.student.logits(self.student_hidden), self.teacher.logits(self.teacher_hidden)
        return tuple((z / self.temperature).log_softmax(-1) for z in (student, teacher))  # type: ignore[return-value]


def make_case(decorated: bool, dtype: torch.dtype = torch.float64) -> Case:
    """Two heads of different widths; `decorated` gives them bias, scale, softcap and the temperature."""

    def head(width: int, scale: float, softcap: float) -> Head:
        weight = torch.randn(V, width, dtype=torch.float64).to(dtype).requires_grad_()
        if not decorated:
            return Head(weight)
        bias = torch.randn(V, dtype=torch.float64).to(dtype).requires_grad_()
        return Head(weight, bias, logit_scale=scale, softcap=softcap)

    return Case(
        student_hidden=torch.randn(N, H, dtype=torch.float64).to(dtype).requires_grad_(),
        teacher_hidden=torch.randn(N, H + 2, dtype=torch.float64).to(dtype).requires_grad_(),
        student=head(H, 0.7, 4.0),
        teacher=head(H + 2, 1.3, 3.0),
        weights=torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 0.1, 1.0], dtype=torch.float64),
        temperature=1.7 if decorated else 1.0,
    )


def divergence_by_hand(p: Tensor, q: Tensor, beta: float) -> Tensor:
    if beta == 1:
        return (p * (p / q).log()).sum()
    if beta == 0:
        return (q * (q / p).log()).sum()
    m = (1 - beta) * p + beta * q
    return beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()


def reference(log_p: Tensor, log_q: Tensor, vocabulary: str, support: str, beta: float) -> Tensor:
    """The definitions, a position at a time, in probabilities; differentiable."""
    values = []
    for p, q in zip(log_p.exp(), log_q.exp(), strict=True):
        if vocabulary == "full":
            values.append(divergence_by_hand(p, q, beta))
            continue
        ids = IDS if vocabulary == "safety_tokens" else q.argsort(descending=True)[:TOP_K]
        on_p, on_q = p[ids], q[ids]
        if support == "tail":
            on_p = torch.cat([on_p, 1 - on_p.sum(0, keepdim=True)])
            on_q = torch.cat([on_q, 1 - on_q.sum(0, keepdim=True)])
        if support == "renormalized":
            on_p, on_q = on_p / on_p.sum(), on_q / on_q.sum()
        value = divergence_by_hand(on_p, on_q, beta)
        if support == "generalized":
            value = value + {1.0: -1, 0.0: 1}.get(beta, 0) * (on_p.sum() - on_q.sum())
        values.append(value)
    return torch.stack(values)


def as_float64(case: Case) -> Case:
    """The same numbers as float64 leaves."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_()

    heads = [replace(h, weight=wide(h.weight), bias=wide(h.bias)) for h in (case.student, case.teacher)]
    return replace(
        case,
        student_hidden=wide(case.student_hidden),
        teacher_hidden=wide(case.teacher_hidden),
        student=heads[0],
        teacher=heads[1],
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())
