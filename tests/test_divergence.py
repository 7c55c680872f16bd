"""The chunked divergence against plain float64 equations, TRL's own, and limits on memory and products."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safesteer.divergence import (
    DivergenceOutput,
    Support,
    Vocabulary,
    dense_divergence,
    localized_divergence,
)
from safesteer.errors import SafeSteerError
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


@pytest.mark.parametrize("decorated", [False, True], ids=["plain", "decorated"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
class TestEveryCombination:
    def test_equals_autograd_of_the_definitions(
        self, vocabulary: Vocabulary, support: Support, beta: float, decorated: bool
    ) -> None:
        case = make_case(decorated)
        expected = reference(*case.log_probabilities(), vocabulary, support, beta)
        gradients = torch.autograd.grad((case.weights * expected).sum(), case.trained())

        output = case.score(vocabulary=vocabulary, support=support, beta=beta)
        output.loss.backward()

        scored = case.weights != 0
        torch.testing.assert_close(output.per_token[scored], expected[scored], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(output.loss, (case.weights * expected).sum(), rtol=1e-10, atol=1e-12)
        for tensor, gradient in zip(case.trained(), gradients, strict=True):
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-10, atol=1e-12)
        assert case.teacher_hidden.grad is None and case.teacher.weight.grad is None

    def test_dense_equals_the_definitions(
        self, vocabulary: Vocabulary, support: Support, beta: float, decorated: bool
    ) -> None:
        case = make_case(decorated)
        expected = reference(*case.log_probabilities(), vocabulary, support, beta)
        actual = dense_divergence(
            case.student.logits(case.student_hidden),
            case.teacher.logits(case.teacher_hidden),
            token_ids=IDS,
            vocabulary=vocabulary,
            support=support,
            beta=beta,
            top_k=TOP_K,
            temperature=case.temperature,
        )
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        for got, want in zip(
            torch.autograd.grad(actual.sum(), case.trained()),
            torch.autograd.grad(expected.sum(), case.trained()),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)], ids=["float32", "bfloat16"]
    )
    def test_narrow_inputs_lose_only_the_gradients_last_rounding(
        self,
        vocabulary: Vocabulary,
        support: Support,
        beta: float,
        decorated: bool,
        dtype: torch.dtype,
        tolerance: float,
    ) -> None:
        case = make_case(decorated, dtype)
        exact = as_float64(case)
        options: dict[str, Any] = {"vocabulary": vocabulary, "support": support, "beta": beta}
        expected, output = exact.score(**options), case.score(**options)
        expected.loss.backward()
        output.loss.backward()

        assert output.loss.dtype == output.per_token.dtype == output.entropy.dtype == torch.float32
        assert relative_error(output.per_token, expected.per_token) < 1e-5
        for tensor, wide in zip(case.trained(), exact.trained(), strict=True):
            assert tensor.grad is not None and wide.grad is not None and tensor.grad.dtype == dtype
            assert relative_error(tensor.grad, wide.grad) < tolerance

    def test_statistics_equal_the_definitions_and_can_be_skipped(
        self, vocabulary: Vocabulary, support: Support, beta: float, decorated: bool
    ) -> None:
        case = make_case(decorated)
        log_p, log_q = (log.detach() for log in case.log_probabilities())
        kl = log_p.exp() * (log_p - log_q)
        options: dict[str, Any] = {"vocabulary": vocabulary, "support": support, "beta": beta}
        output, quick = case.score(**options), case.score(**options, statistics=False)

        scored = case.weights != 0
        expected = {
            "student_mass": log_p[:, IDS].exp().sum(-1),
            "teacher_mass": log_q[:, IDS].exp().sum(-1),
            "kl_on": kl[:, IDS].sum(-1),
            "kl_off": kl.sum(-1) - kl[:, IDS].sum(-1),
            "entropy": -(log_p.exp() * log_p).sum(-1),
        }
        for name, value in expected.items():
            actual = getattr(output, name)
            torch.testing.assert_close(actual[scored], value[scored], rtol=1e-10, atol=1e-12)
            assert actual[~scored].eq(0).all() and not actual.requires_grad
            cheap = getattr(quick, name)
            if name in ("kl_off", "entropy"):
                assert cheap[scored].isnan().all()
            else:
                torch.testing.assert_close(cheap, actual, rtol=0, atol=0)
        torch.testing.assert_close(quick.loss, output.loss, rtol=0, atol=0)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_gradcheck(vocabulary: Vocabulary, beta: float, support: Support) -> None:
    case = make_case(decorated=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = replace(case.student, weight=weight, bias=bias)
        changed = replace(case, student_hidden=hidden, student=student)
        return changed.score(vocabulary=vocabulary, support=support, beta=beta).loss

    assert torch.autograd.gradcheck(loss, tuple(case.trained()))


@pytest.mark.parametrize("vocabulary", ["teacher_top_k", "full"])
def test_without_token_ids_statistics_speak_of_the_loss_own_set(vocabulary: Vocabulary) -> None:
    case = make_case(decorated=False)
    log_p, log_q = (log.detach() for log in case.log_probabilities())
    kl = log_p.exp() * (log_p - log_q)
    ids = log_q.topk(TOP_K if vocabulary == "teacher_top_k" else V).indices
    output = case.score(vocabulary=vocabulary, token_ids=None)
    scored = case.weights != 0
    for actual, expected in (
        (output.student_mass, log_p.exp().gather(1, ids).sum(-1)),
        (output.teacher_mass, log_q.exp().gather(1, ids).sum(-1)),
        (output.kl_on, kl.gather(1, ids).sum(-1)),
        (output.kl_off, kl.sum(-1) - kl.gather(1, ids).sum(-1)),
    ):
        torch.testing.assert_close(actual[scored], expected[scored], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decorated", [False, True], ids=["plain", "decorated"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("support", [*SUPPORTS, None])
def test_equals_trl_when_s_is_the_whole_vocabulary(
    support: Support | None, beta: float, decorated: bool
) -> None:
    """`None` is `vocabulary="full"`; TRL computes in float32."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    case = replace(make_case(decorated, torch.float32), weights=torch.tensor([1.0, 0, 1, 1, 0, 1, 1]) / 5)
    peer, _, _ = _chunked_divergence_loss(
        case.student_hidden[None],
        case.teacher_hidden[None],
        case.student.weight,
        case.teacher.weight,
        case.weights[None] != 0,
        beta,
        student_lm_head_bias=case.student.bias,
        teacher_lm_head_bias=case.teacher.bias,
        student_logit_scale=case.student.logit_scale,
        teacher_logit_scale=case.teacher.logit_scale,
        student_final_logit_softcapping=case.student.softcap,
        teacher_final_logit_softcapping=case.teacher.softcap,
        temperature=case.temperature,
    )
    expected = torch.autograd.grad(peer, case.trained())

    where: dict[str, Any] = {"vocabulary": "full"} if support is None else {"support": support}
    loss = case.score(**where, beta=beta, token_ids=torch.randperm(V)).loss
    torch.testing.assert_close(loss, peer, rtol=1e-5, atol=1e-7)
    for actual, gradient in zip(torch.autograd.grad(loss, case.trained()), expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100, None])
def test_chunk_size_changes_nothing(vocabulary: Vocabulary, chunk_size: int | None) -> None:
    case = make_case(decorated=True)
    whole = case.score(vocabulary=vocabulary, chunk_size=N)
    parts = case.score(vocabulary=vocabulary, chunk_size=chunk_size)
    torch.testing.assert_close(parts.per_token, whole.per_token, rtol=1e-12, atol=1e-14)
    for a, b in zip(
        torch.autograd.grad(parts.loss, case.trained()),
        torch.autograd.grad(whole.loss, case.trained()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_rows_of_weight_zero_are_never_read() -> None:
    case = make_case(decorated=False)
    expected = case.score()
    expected.loss.backward()
    skipped = case.weights == 0
    poisoned = replace(
        case,
        student_hidden=case.student_hidden.detach().masked_fill(skipped[:, None], torch.nan).requires_grad_(),
        teacher_hidden=case.teacher_hidden.detach().masked_fill(skipped[:, None], torch.nan),
    )
    output = poisoned.score()
    output.loss.backward()
    torch.testing.assert_close(output.per_token, expected.per_token, rtol=0, atol=0)
    torch.testing.assert_close(poisoned.student_hidden.grad, case.student_hidden.grad, rtol=0, atol=0)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_no_positions_give_a_differentiable_zero(vocabulary: Vocabulary) -> None:
    case = make_case(decorated=True)
    none = replace(
        case,
        student_hidden=case.student_hidden.detach()[:0].requires_grad_(),
        teacher_hidden=case.teacher_hidden.detach()[:0],
        weights=case.weights[:0],
    )
    output = none.score(vocabulary=vocabulary)
    output.loss.backward()
    assert output.loss == 0 and output.per_token.shape == output.entropy.shape == (0,)
    assert none.student_hidden.grad is not None and none.student_hidden.grad.shape == (0, H)
    assert none.student.weight.grad is not None and none.student.weight.grad.eq(0).all()


def test_tied_embeddings_shared_with_the_teacher_collect_only_the_students_gradient() -> None:
    """One tensor is the student's embedding, its head, and the teacher's head."""
    embedding = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    tokens, weights = torch.randint(V, (N,)), torch.rand(N, dtype=torch.float64)
    shift = torch.randn(H, dtype=torch.float64)

    hidden = embedding[tokens].tanh()
    expected = dense_divergence(
        hidden @ embedding.T, (hidden.detach() + shift) @ embedding.detach().T, token_ids=IDS
    )
    (gradient,) = torch.autograd.grad((weights * expected).sum(), embedding, retain_graph=True)

    head = Head(embedding)
    loss = localized_divergence(hidden, hidden + shift, head, head, weights, token_ids=IDS, chunk_size=3).loss
    torch.testing.assert_close(torch.autograd.grad(loss, embedding)[0], gradient, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_a_scaled_loss_scales_it() -> None:
    case = make_case(decorated=True)
    frozen = replace(case, student=replace(case.student, weight=case.student.weight.detach(), bias=None))
    loss = frozen.score().loss
    (once,) = torch.autograd.grad(loss, case.student_hidden, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, case.student_hidden)
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-12, atol=0)


def test_no_grad_gives_the_same_loss_without_a_graph() -> None:
    case = make_case(decorated=True)
    with torch.no_grad():
        loss = case.score().loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, case.score().loss.detach(), rtol=1e-14, atol=0)


def test_autocast_does_not_narrow_the_statistics() -> None:
    case = make_case(decorated=True, dtype=torch.float32)
    expected = as_float64(case).score()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = case.score()
    assert relative_error(output.per_token, expected.per_token) < 1e-5
    assert relative_error(output.entropy, expected.entropy) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("support", ["tail", "generalized", "truncated"])
def test_a_sure_teacher_keeps_its_tail_in_float32(support: Support, beta: float) -> None:
    """q(rest) ≈ 1e-9 is below float32's resolution of 1 − q(S), and the student's loss hangs on its logarithm."""
    teacher = torch.zeros(1, V)
    teacher[0, IDS[0]] = 24.0
    student = torch.randn(1, V)
    identity = Head(torch.eye(V))
    options: dict[str, Any] = {"token_ids": IDS, "support": support, "beta": beta}
    narrow, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    output = localized_divergence(narrow, teacher, identity, identity, torch.ones(1), **options)
    exact = dense_divergence(wide, teacher.double(), **options)
    torch.testing.assert_close(output.per_token.double(), exact.detach(), rtol=1e-5, atol=1e-7)
    output.loss.backward()
    exact.sum().backward()
    assert wide.grad is not None and narrow.grad is not None
    assert relative_error(narrow.grad, wide.grad) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_impossible_tokens_stay_finite(vocabulary: Vocabulary, support: Support, beta: float) -> None:
    """Logits far enough apart that probabilities underflow to zero in float32, in opposite places."""
    student, teacher = torch.zeros(1, V), torch.zeros(1, V)
    student[0, 5], teacher[0, 3] = 300.0, 300.0
    student.requires_grad_()
    identity = Head(torch.eye(V))
    output = localized_divergence(
        student,
        teacher,
        identity,
        identity,
        torch.ones(1),
        token_ids=IDS,
        vocabulary=vocabulary,
        support=support,
        beta=beta,
        top_k=TOP_K,
    )
    output.loss.backward()
    values = torch.stack([getattr(output, name) for name in ("per_token", "kl_on", "kl_off", "entropy")])
    assert values.isfinite().all()
    assert student.grad is not None and student.grad.isfinite().all()


class Watch(TorchDispatchMode):
    """Records the largest tensor made, and how many matrix products and passes have a vocabulary-sized side."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0
        self.vocabulary_sized = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in made)])
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += 1
        elif any(t.ndim == 2 and t.shape[1] == 997 for t in made):
            self.vocabulary_sized += 1
        return result


def watched(vocabulary: Vocabulary, statistics: bool, trained_head: bool = False) -> Watch:
    tokens, size, width = 320, 997, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    student = Head(torch.randn(size, width, requires_grad=trained_head))
    teacher = Head(torch.randn(size, width))
    with Watch() as watch:
        localized_divergence(
            hidden,
            torch.randn(tokens, width),
            student,
            teacher,
            torch.ones(tokens),
            token_ids=torch.arange(50),
            vocabulary=vocabulary,
            chunk_size=32,
            statistics=statistics,
        ).loss.backward()
    return watch


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_no_tensor_is_larger_than_a_chunk_of_logits(vocabulary: Vocabulary, trained_head: bool) -> None:
    assert watched(vocabulary, statistics=True, trained_head=trained_head).largest <= 32 * 997


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_chunk_costs_one_product_with_each_head_and_one_for_the_gradient(vocabulary: Vocabulary) -> None:
    assert watched(vocabulary, statistics=True).products == 10 * 3
    assert watched(vocabulary, statistics=True, trained_head=True).products == 10 * 4


def test_skipping_statistics_skips_passes_over_the_vocabulary() -> None:
    quick, full = (watched("safety_tokens", statistics=s).vocabulary_sized for s in (False, True))
    assert full - quick == 10 * 3  # the gap, its mean's product and the logits'


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: bfloat16 products summed in float32"
)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_cuda_bfloat16(vocabulary: Vocabulary, autocast: bool) -> None:
    case = make_case(decorated=True, dtype=torch.bfloat16)
    exact = as_float64(case)
    dtype = torch.float32 if autocast else torch.bfloat16

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to("cuda", dtype).requires_grad_()

    heads = [replace(h, weight=moved(h.weight), bias=moved(h.bias)) for h in (case.student, case.teacher)]
    case = replace(
        case,
        student_hidden=moved(case.student_hidden),
        teacher_hidden=moved(case.teacher_hidden),
        student=heads[0],
        teacher=heads[1],
    )
    with torch.autocast("cuda", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        output = case.score(vocabulary=vocabulary)
    output.loss.backward()
    exact.score(vocabulary=vocabulary).loss.backward()
    assert relative_error(output.per_token.cpu(), exact.score(vocabulary=vocabulary).per_token) < 1e-5
    for tensor, wide in zip(case.trained(), exact.trained(), strict=True):
        assert tensor.grad is not None and wide.grad is not None
        assert relative_error(tensor.grad.cpu(), wide.grad) < 2**-7


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"token_ids": None}, "token_ids is missing"),
        ({"token_ids": torch.tensor([], dtype=torch.int64)}, "token_ids is empty"),
        ({"token_ids": torch.tensor([1, V])}, f"from 1 to {V}, outside the vocabulary of {V}"),
        ({"token_ids": torch.tensor([2, 1, 2])}, "names a token twice"),
        ({"token_ids": torch.tensor([0.5])}, "flat list of integers"),
        ({"vocabulary": "subset"}, "vocabulary is 'subset'"),
        ({"support": "truncate"}, "support is 'truncate'"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"vocabulary": "teacher_top_k", "top_k": V + 1}, f"outside \\[1, {V}\\]"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_a_wrong_option_is_told_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SafeSteerError, match=sentence):
        make_case(decorated=False).score(**options)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"student_hidden": torch.zeros(N, H + 1)}, "student_hidden has shape"),
        ({"teacher_hidden": torch.zeros(1, N, H + 2)}, "teacher_hidden has shape"),
        ({"teacher_hidden": torch.zeros(N - 1, H + 2)}, "one row and one weight per position"),
        ({"weights": torch.ones(N + 1)}, "one row and one weight per position"),
        ({"teacher": Head(torch.zeros(V + 1, H + 2))}, "models with one vocabulary"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_shapes_that_disagree_are_told_in_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SafeSteerError, match=sentence):
        replace(make_case(decorated=False), **change).score()
