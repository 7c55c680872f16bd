"""The localized divergence beside bare matrix products, TRL's chunked full-vocabulary divergence and a dense loss.

    python benchmarks/loss.py [--tokens 512] [--hidden 1024] [--vocabulary 151936]

Forward and backward, float32 on a CPU, bfloat16 on a GPU. Bare products are what any loss with a gradient to the hidden
states must do: one with each head and one for the gradient (a fourth for the head's own gradient).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measuring import figure, parser_of, peak_extra_memory, record, side_by_side
from torch import Tensor
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from safesteer.divergence import dense_divergence, localized_divergence
from safesteer.modeling import Head


class Case:
    """Random hidden states and heads of one size, and the losses on them."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int, *, trained_head: bool) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(0)
        self.student = torch.randn(tokens, hidden, device=device, dtype=dtype).requires_grad_()
        self.teacher = (self.student + 0.3 * torch.randn_like(self.student)).detach()
        self.head = (
            torch.randn(vocabulary, hidden, device=device, dtype=dtype) / hidden**0.5
        ).requires_grad_(trained_head)
        self.frozen = self.head.detach().clone()
        self.weights = torch.full((tokens,), 1 / tokens, device=device)
        self.ids = torch.randperm(vocabulary, device=device)[:50]

    def forget(self) -> None:
        """Drop gradients of earlier calls, which memory would otherwise be measured from."""
        self.student.grad = self.head.grad = None

    def _backward(self, loss: Tensor) -> None:
        self.forget()
        loss.backward()  # type: ignore[no-untyped-call]

    def localized(self, statistics: bool = False) -> None:
        """Ours."""
        out = localized_divergence(
            self.student,
            self.teacher,
            Head(self.head),
            Head(self.frozen),
            self.weights,
            token_ids=self.ids,
            statistics=statistics,
        )
        self._backward(out.loss)

    def trl(self) -> None:
        """TRL's chunked reverse KL over the whole vocabulary."""
        loss, *_ = _chunked_divergence_loss(
            self.student[None],
            self.teacher[None],
            self.head,
            self.frozen,
            torch.ones(1, len(self.student), device=self.student.device),
            beta=1.0,
        )
        self._backward(loss)

    def dense(self) -> None:
        """The same loss as ours from whole log-softmaxes and autograd, as method.md §4 is first written down."""
        log_p = F.log_softmax(F.linear(self.student, self.head).float(), -1)
        with torch.no_grad():
            log_q = F.log_softmax(F.linear(self.teacher, self.frozen).float(), -1)
        p_S, q_S = log_p[:, self.ids], log_q[:, self.ids]
        rest_p, rest_q = (torch.log1p(-x.exp().sum(-1)) for x in (p_S, q_S))
        loss = (p_S.exp() * (p_S - q_S)).sum(-1) + rest_p.exp() * (rest_p - rest_q)
        self._backward((self.weights * loss).sum())

    @torch.no_grad()
    def products(self, chunk: int = 256) -> None:
        """Nothing but the matrix products, a chunk of tokens at a time."""
        gradient = torch.zeros_like(self.head) if self.head.requires_grad else None
        for start in range(0, len(self.student), chunk):
            student, teacher = self.student[start : start + chunk], self.teacher[start : start + chunk]
            z = student @ self.head.T
            _ = teacher @ self.frozen.T
            _ = z @ self.head
            if gradient is not None:
                gradient.addmm_(z.T, student)


def worst_gradient_error(hidden: int = 64, vocabulary: int = 5_000) -> float:
    """Largest relative error of our float32 gradient against autograd through the dense loss in float64."""
    case = Case(200, hidden, vocabulary, trained_head=False)
    case.student = case.student.float().detach().requires_grad_()
    case.teacher, case.head, case.frozen = (
        t.detach().float() for t in (case.teacher, case.head, case.frozen)
    )
    case.localized()
    assert case.student.grad is not None
    wide = case.student.detach().double().requires_grad_()
    z_p, z_q = wide @ case.head.double().T, case.teacher.double() @ case.frozen.double().T
    loss = (case.weights.double() * dense_divergence(z_p, z_q, token_ids=case.ids)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert wide.grad is not None
    return float((case.student.grad.double() - wide.grad).norm() / wide.grad.norm())


def main() -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    size = {"tokens": args.tokens, "hidden": args.hidden, "vocabulary": args.vocabulary}
    entries = []
    for trained, head in ((False, "frozen head"), (True, "trained head")):
        case = Case(**size, trained_head=trained)
        work: dict[str, Callable[[], object]] = {
            "ours": case.localized,
            "with statistics": partial(case.localized, True),
            "trl": case.trl,
            "products": case.products,
        }
        seconds = side_by_side(work, args.rounds)
        bare = "four" if trained else "three"
        memory = []
        for run in (case.localized, case.dense):
            case.forget()
            memory.append(peak_extra_memory(run))
        entries += [
            figure(f"loss, {head}, against TRL's", seconds["ours"], seconds["trl"], "s", **size),
            figure(
                f"loss, {head}, against {bare} bare products",
                seconds["ours"],
                seconds["products"],
                "s",
                **size,
            ),
            figure(
                f"loss with all statistics, {head}, against TRL's",
                seconds["with statistics"],
                seconds["trl"],
                "s",
                **size,
            ),
            figure(
                f"peak extra memory of the loss, {head}, against dense",
                *memory,
                "MB",
                **size,
            ),
        ]
    error = worst_gradient_error()
    entries.append(figure("relative error of the gradient, against dense float64 (bar)", error, 1e-5, ""))
    record("loss", entries)


if __name__ == "__main__":
    main()
