"""The training step, against the method's equations in float64, and what surrounds it."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_training as tiny
from safesteer.steering import Steering
from safesteer.teacher import FrozenCopyTeacher

IDS = torch.tensor(tiny.SAFETY_TOKENS)


def divergence(p_log: Tensor, q_log: Tensor, support: str) -> Tensor:
    """Reverse KL confined to S, [T, V] log-probabilities to [T] (method §4 and §6.1)."""
    p_on, q_on = p_log[:, IDS], q_log[:, IDS]
    on = (p_on.exp() * (p_on - q_on)).sum(-1)
    if support == "truncated":
        return on
    p_off, q_off = 1 - p_on.exp().sum(-1), 1 - q_on.exp().sum(-1)
    return on + p_off * (p_off.log() - q_off.log())


def exact_loss(
    student: Any,
    base: Any,
    steering: Steering,
    batch: dict[str, Any],
    *,
    reduction: str,
    support: str,
    first: int | None,
    skip: int,
) -> Tensor:
    """The loss of a whole step written out: one unpadded row at a time, dense logits, float64."""
    shift = steering.coefficient * steering.vector.double()
    means, sums, tokens = [], torch.zeros((), dtype=torch.float64), 0
    for row in range(len(batch["steered"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        response = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, response])[None]
        hook = None
        if batch["steered"][row]:
            layer = base.model.layers[steering.layer]
            hook = layer.register_forward_pre_hook(lambda _, args: (args[0] + shift, *args[1:]))
        with torch.no_grad():
            q_log = base(ids).logits[0].log_softmax(-1)
        if hook is not None:
            hook.remove()
        p_log = student(ids).logits[0].log_softmax(-1)
        positions = slice(len(prompt) - 1, -1)
        per_token = divergence(p_log[positions], q_log[positions], support)[skip:first]
        if len(per_token):
            means.append(per_token.mean())
            sums = sums + per_token.sum()
            tokens += len(per_token)
    return torch.stack(means).mean() if reduction == "response" else sums / tokens


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "steered")
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("reduction", "support", "first", "skip"),
    [
        ("response", "tail", None, 0),
        ("token", "tail", None, 0),
        ("response", "truncated", 3, 0),
        ("token", "truncated", None, 2),
        ("response", "tail", 4, 1),
    ],
)
def test_a_step_is_the_equations_in_float64(
    tmp_path: Path, adapter: bool, reduction: str, support: str, first: int | None, skip: int
) -> None:
    """Loss and gradient, summed over microbatches of different lengths with anchors among them."""
    options: dict[str, Any] = {
        "reduction": reduction,
        "support": support,
        "first_tokens": first,
        "skip_tokens": skip,
    }
    run = tiny.trainer(
        tmp_path,
        cls=tiny.FixedResponses,
        peft_config=tiny.lora() if adapter else None,
        anchor_fraction=0.25,
        **options,
    )
    tiny.jolt(run.model)
    batches = tiny.microbatches(run)
    losses = [run.compute_loss(run.model, batch) for batch in batches]
    sum(losses).backward()

    student = copy.deepcopy(run.model).double().eval()
    student.zero_grad()
    expected = exact_loss(
        student,
        tiny.model().double(),
        tiny.steering(),
        joined(batches),
        reduction=reduction,
        support=support,
        first=first,
        skip=skip,
    )
    expected.backward()
    assert sum(losses).item() == pytest.approx(expected.item(), rel=1e-4)
    trained = {name: value for name, value in run.model.named_parameters() if value.requires_grad}
    reference = dict(student.named_parameters())
    assert trained
    for name, value in trained.items():
        torch.testing.assert_close(value.grad.double(), reference[name].grad, rtol=2e-3, atol=2e-6, msg=name)


class SixTokens(tiny.FixedResponses):
    """Answers with the first tokens of one response of six, as many as it may."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        chances = [random.Random(str(list(ids))) for ids in prompt_ids]
        return [[c.randrange(3, 200) for _ in range(6)][: self.max_completion_length] for c in chances]


def test_tokens_that_do_not_count_are_not_sampled(tmp_path: Path) -> None:
    """And the loss is what it is when they are."""
    losses = {}
    for sampled in (3, 6):
        run = tiny.trainer(tmp_path, cls=SixTokens, first_tokens=3, max_completion_length=6)
        assert run.max_completion_length == run.generation_kwargs["max_new_tokens"] == 3
        run.max_completion_length = sampled
        tiny.jolt(run.model)
        batches = tiny.microbatches(run)
        assert all(batch["completion_mask"].sum(1).max() == sampled for batch in batches)
        losses[sampled] = sum(run.compute_loss(run.model, batch) for batch in batches)
    torch.testing.assert_close(losses[3], losses[6])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"generation_kwargs": {"typical_p": 0.2}}])
def test_rollouts_are_drawn_from_a_seed_a_row_unless_tokens_are_ruled_out(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    run = tiny.trainer(tmp_path, max_completion_length=24, **options)
    prompts = tiny.chat().encode([tiny.HARMFUL[0]] * 8)
    torch.manual_seed(0)
    first = run._generate_single_turn(prompts, None, {})
    assert len(set(map(tuple, first))) == 8  # each row is its own draw
    torch.manual_seed(1)
    assert (run._generate_single_turn(prompts, None, {}) == first) == (not options)
    run.state.global_step = 1
    assert run._generate_single_turn(prompts, None, {}) != first
    assert "generate" not in vars(run.model)


def test_logged_statistics_are_averages_over_counted_tokens_by_kind(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, cls=tiny.FixedResponses, anchor_fraction=0.25, max_steps=1, learning_rate=0.0
    )
    tiny.jolt(run.model)
    student, base = copy.deepcopy(run.model).double().eval(), tiny.model().double()
    batch = joined(tiny.microbatches(run))
    run.train()
    logged = run.state.log_history[0]
    shift = 2.0 * tiny.steering().vector.double()
    for kind, prefix in ((True, ""), (False, "anchor/")):
        names = ("student_mass", "teacher_mass", "kl_on", "kl_off", "entropy", "divergence")
        sums, tokens = dict.fromkeys(names, 0.0), 0
        for row in range(len(batch["steered"])):
            if bool(batch["steered"][row]) != kind:
                continue
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            response = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
            ids = torch.cat([prompt, response])[None]
            hook = base.model.layers[tiny.LAYER].register_forward_pre_hook(
                lambda _, args, kind=kind: (args[0] + shift * kind, *args[1:])
            )
            with torch.no_grad():
                p = student(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
                q = base(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
            hook.remove()
            ratio = p * (p / q).log()
            sums["student_mass"] += p[:, IDS].sum().item()
            sums["teacher_mass"] += q[:, IDS].sum().item()
            sums["kl_on"] += ratio[:, IDS].sum().item()
            sums["kl_off"] += ratio.sum().item() - ratio[:, IDS].sum().item()
            sums["entropy"] -= (p * p.log()).sum().item()
            sums["divergence"] += divergence(p.log(), q.log(), "tail").sum().item()
            tokens += len(response)
        assert tokens
        for name, total in sums.items():
            assert logged[prefix + name] == pytest.approx(total / tokens, rel=1e-3, abs=1e-5), prefix + name
    lengths = batch["completion_mask"].sum(1).float()
    assert logged["completions/mean_length"] == pytest.approx(lengths.mean().item())


def test_an_unmoved_student_differs_from_its_teacher_on_harmful_rows_only(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, peft_config=tiny.lora(), anchor_fraction=0.5, max_steps=1)
    run.train()
    logged = run.state.log_history[0]
    assert logged["anchor/divergence"] == pytest.approx(0.0, abs=1e-7)
    assert logged["divergence"] > 1e-3


@pytest.mark.parametrize("reduction", ["response", "token"])
def test_four_microbatches_of_one_are_one_of_four(tmp_path: Path, reduction: str) -> None:
    results = []
    for micro, accumulation in ((1, 4), (4, 1), (2, 2)):
        gradients = tiny.Gradients()
        run = tiny.trainer(
            tmp_path,
            cls=tiny.FixedResponses,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            reduction=reduction,
            anchor_fraction=0.25,
            max_grad_norm=0.0,
            max_steps=2,
            arguments={"callbacks": [gradients]},
        )
        run.train()
        results.append((run.state.log_history, gradients.steps))
    (log, steps), *others = results
    for other_log, other_steps in others:
        for entry, other in zip(log[:2], other_log[:2], strict=True):
            for name in ("loss", "divergence", "student_mass", "entropy", "anchor/divergence"):
                assert other[name] == pytest.approx(entry[name], rel=1e-5, abs=1e-7), name
        for one, other in zip(steps, other_steps, strict=True):
            assert one.keys() == other.keys()
            for name, gradient in one.items():
                torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("adapter", "weights", "teacher"),
    [
        (False, torch.float32, "frozen_copy"),
        (True, torch.float32, "adapter_off"),
        (True, torch.bfloat16, "adapter_off"),
        (True, torch.float32, "ema"),
    ],
)
def test_bfloat16_gives_the_gradient_within_its_precision(
    tmp_path: Path, adapter: bool, weights: torch.dtype, teacher: Any
) -> None:
    """Mixed precision over float32 weights, and bfloat16 weights under an adapter."""
    steps = []
    for bf16, dtype in ((False, torch.float32), (True, weights)):
        gradients = tiny.Gradients()
        run = tiny.trainer(
            tmp_path,
            student=tiny.model().to(dtype),
            cls=tiny.FixedResponses,
            peft_config=tiny.lora(init_lora_weights=False) if adapter else None,
            teacher=teacher,
            bf16=bf16,
            max_steps=1,
            max_grad_norm=0.0,
            arguments={"callbacks": [gradients]},
        )
        run.train()
        steps.append((run.state.log_history[0]["loss"], gradients.steps[0]))
    (loss, exact), (rough_loss, rough) = steps
    assert rough_loss == pytest.approx(loss, rel=0.1)
    assert exact.keys() == rough.keys()
    one = torch.cat([exact[name].double().flatten() for name in exact])
    other = torch.cat([rough[name].double().flatten() for name in exact])
    assert torch.cosine_similarity(one, other, dim=0) > 0.98
    assert all(gradient.any() for gradient in rough.values())


@pytest.mark.parametrize("adapter", [False, True])
def test_mixed_precision_reaches_teacher_and_student(tmp_path: Path, adapter: bool) -> None:
    """The loss goes around the forward that accelerate puts autocast into."""
    run = tiny.trainer(
        tmp_path,
        cls=tiny.FixedResponses,
        peft_config=tiny.lora() if adapter else None,
        bf16=True,
        max_steps=1,
    )
    dtypes = []
    teacher = run.teacher.unwrapped() if isinstance(run.teacher, FrozenCopyTeacher) else run.model
    for model in {run.model, teacher}:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    with torch.enable_grad():
        run.compute_loss(run.model, tiny.microbatches(run)[0])
    assert len(dtypes) > 20
    assert set(dtypes) == {torch.bfloat16}


def test_responses_without_counted_tokens_are_left_out_of_the_mean(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, cls=tiny.FixedResponses, skip_tokens=3)
    batches = tiny.microbatches(run)
    weights = torch.cat([batch["loss_weights"].sum(1) for batch in batches])
    lengths = torch.cat([batch["completion_mask"].sum(1) for batch in batches])
    assert 0 < (lengths > 3).sum() < len(lengths), "the prompts must give both kinds"
    torch.testing.assert_close(weights, (lengths > 3).float() / (lengths > 3).sum())

    nothing = tiny.trainer(tmp_path, cls=tiny.FixedResponses, skip_tokens=6, max_completion_length=7)
    for batch in tiny.microbatches(nothing):
        loss = nothing.compute_loss(nothing.model, batch)
        assert loss.item() == 0.0
        loss.backward()
    assert all(value.grad is None or not value.grad.any() for value in nothing.model.parameters())


def test_every_step_has_its_anchors(tmp_path: Path) -> None:
    class Recording(tiny.FixedResponses):
        steps: list[list[tuple[str, bool]]] = []

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            self.steps.append([(row["prompt"], row["steered"]) for row in inputs])
            output = super()._generate_and_score_completions(inputs)
            assert output["steered"].tolist() == [row["steered"] for row in inputs]
            return output

    Recording.steps = []
    run = tiny.trainer(tmp_path, cls=Recording, anchor_fraction=0.5, num_train_epochs=2)
    run.train()
    assert run.state.global_step == 12, "2 passes over 12 harmful prompts, 2 of them a step"
    assert len(Recording.steps) == 12
    assert all(sum(steered for _, steered in step) == 2 for step in Recording.steps)
    harmful = [prompt for step in Recording.steps for prompt, steered in step if steered]
    assert sorted(harmful[:12]) == sorted(harmful[12:]) == sorted(tiny.HARMFUL)
    assert harmful[:12] != harmful[12:]


def test_rows_keep_their_kind_and_weights_through_shuffling(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, cls=tiny.FixedResponses, anchor_fraction=0.5, per_device_train_batch_size=4)
    harmless = {tuple(ids) for ids in run.chat.encode(tiny.HARMLESS)}
    for batch in tiny.microbatches(run):
        for ids, mask, steered, length, weights in zip(
            batch["prompt_ids"],
            batch["prompt_mask"],
            batch["steered"],
            batch["completion_mask"].sum(1),
            batch["loss_weights"],
            strict=True,
        ):
            assert bool(steered) == (tuple(ids[mask.bool()].tolist()) not in harmless)
            assert int((weights > 0).sum()) == int(length)


def test_prompts_are_rendered_by_the_chat(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, max_prompt_length=25)
    ids, images, extra = run._tokenize_prompts(list(tiny.HARMFUL[:3]))
    assert ids == run.chat.encode(tiny.HARMFUL[:3], max_length=25)
    assert (images, extra) == (None, {})
    assert all(len(row) <= 25 for row in ids)


def sampled(folder: Path, step: int = 0, seed: int = 42, **model: Any) -> tuple[Tensor, Tensor]:
    """Responses of a step, and what the global generator, seeded before, gives after them."""
    run = tiny.trainer(folder, student=tiny.model(**model), seed=seed)
    run.state.global_step = step
    rows = tiny.first_rows(run)
    torch.manual_seed(123)
    batch = joined(tiny.microbatches(run, rows))
    assert all(module.training for module in run.model.modules())
    return batch["completion_ids"], torch.rand(3)


def test_sampling_is_without_dropout(tmp_path: Path) -> None:
    assert torch.equal(sampled(tmp_path)[0], sampled(tmp_path, attention_dropout=0.9)[0])


def test_sampling_is_seeded_by_run_and_step_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    responses, after = sampled(tmp_path)
    torch.manual_seed(123)
    assert torch.equal(after, torch.rand(3))
    for other, _ in (sampled(tmp_path, step=1), sampled(tmp_path, seed=7)):
        assert other.shape != responses.shape or not torch.equal(other, responses)
