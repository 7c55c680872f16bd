"""The chunked divergence against plain float64 equations and TRL's own."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from divergence_cases import (
    BETAS,
    IDS,
    SUPPORTS,
    TOP_K,
    VOCABULARIES,
    H,
    N,
    V,
    as_float64,
    make_case,
    reference,
    relative_error,
)
from safesteer.divergence import Support, Vocabulary, dense_divergence, localized_divergence
from safesteer.modeling import Head


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


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("vocabulary", "support"),
    [*(("safety_tokens", support) for support in SUPPORTS), ("teacher_top_k", "tail"), ("full", "tail")],
)
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
    """q(rest) ≈ 1e-9 is below float32's resolution of 1 − q(S), and the loss hangs on its logarithm."""
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: bfloat16 products summed in float32")
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
