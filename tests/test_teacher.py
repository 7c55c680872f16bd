"""The teachers, against references computed row by row without padding, hooks of ours or PEFT."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import tiny_training as tiny
from safesteer.chat import Chat, left_pad
from safesteer.errors import SafeSteerError
from safesteer.modeling import evaluation_flags
from safesteer.steering import Steering
from safesteer.teacher import (
    AdapterOffTeacher,
    FrozenCopyTeacher,
    SystemPromptTeacher,
    completion_hidden_states,
)
from safesteer.teacher_ema import EmaTeacher, load_teacher, save_teacher
from tiny_models import tokenizer_for

PROMPTS = [[1, 9, 30, 31], [1, 7], [1, 8, 200, 17, 5, 6]]
RESPONSES = [[40, 41, 42], [50, 2], [60, 61, 62]]
STEERED = torch.tensor([True, False, True])


def batch() -> dict[str, Tensor]:
    prompt_ids, prompt_mask = left_pad(PROMPTS, 0)
    reversed_ids, reversed_mask = left_pad([row[::-1] for row in RESPONSES], 0)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": reversed_ids.flip(1),
        "completion_mask": reversed_mask.flip(1),
    }


@torch.no_grad()
def reference(
    base: nn.Module, steering: Steering | None, rows: list[bool], prompts: list[list[int]]
) -> list[Tensor]:
    """What predicts each response: one unpadded row at a time, in float64, steered by a plain hook.

    With `steering.at` the prompts must end with it.
    """
    exact: Any = copy.deepcopy(base).double().eval()
    results = []
    for prompt, response, steered in zip(prompts, RESPONSES, rows, strict=True):
        handle = None
        if steering is not None and steered:
            shift = (steering.coefficient * steering.vector.double()).repeat(len(prompt + response), 1)
            if steering.at:
                shift[: len(prompt) - len(steering.at)] = 0.0
                shift[len(prompt) :] = 0.0
            layer = exact.model.layers[steering.layer]
            handle = layer.register_forward_pre_hook(
                lambda _, args, shift=shift: (args[0] + shift, *args[1:])
            )
        hidden = exact.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        results.append(hidden[len(prompt) - 1 : -1])
        if handle is not None:
            handle.remove()
    return results


def assert_rows_close(hidden: Tensor, expected: list[Tensor]) -> None:
    for row, wanted in zip(hidden, expected, strict=True):
        torch.testing.assert_close(row[: len(wanted)].double(), wanted, rtol=1e-4, atol=1e-4)


def adapted(**overrides: Any) -> Any:
    """A student whose adapter has been trained away from zero, in train mode, with dropout."""
    student = get_peft_model(tiny.model(attention_dropout=0.5), tiny.lora(lora_dropout=0.5, **overrides))
    tiny.jolt(student)
    return student.train()


def test_student_hidden_states_are_those_of_unpadded_rows() -> None:
    base = tiny.model()
    assert_rows_close(completion_hidden_states(base, **batch()), reference(base, None, [False] * 3, PROMPTS))


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_adapter_off_steers_the_base_model_row_by_row(layer: int) -> None:
    steering = tiny.steering(layer)
    hidden = AdapterOffTeacher(steering).completion_hidden_states(adapted(), **batch(), steered=STEERED)
    assert not hidden.requires_grad
    assert_rows_close(hidden, reference(tiny.model(), steering, STEERED.tolist(), PROMPTS))


def test_a_teacher_may_be_steered_at_post_instruction_tokens_alone() -> None:
    prompts = [[*prompt, 11, 12] for prompt in PROMPTS]
    ids, mask = left_pad(prompts, 0)
    asked = {**batch(), "prompt_ids": ids, "prompt_mask": mask}
    steering = dataclasses.replace(tiny.steering(1), at=(11, 12))
    expected = reference(tiny.model(), steering, STEERED.tolist(), prompts)
    for teacher in (AdapterOffTeacher(steering), FrozenCopyTeacher(tiny.model(), steering)):
        assert_rows_close(teacher.completion_hidden_states(adapted(), **asked, steered=STEERED), expected)
    everywhere = AdapterOffTeacher(tiny.steering(1))
    with pytest.raises(AssertionError):
        assert_rows_close(everywhere.completion_hidden_states(adapted(), **asked, steered=STEERED), expected)


def test_adapter_off_equals_frozen_copy() -> None:
    """The copy is of the model before PEFT touched it."""
    copied = FrozenCopyTeacher(tiny.model(attention_dropout=0.5), tiny.steering())
    student = adapted()
    shared = AdapterOffTeacher(tiny.steering())
    expected = copied.completion_hidden_states(student, **batch(), steered=STEERED)
    actual = shared.completion_hidden_states(student, **batch(), steered=STEERED)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared.head(student).weight, copied.head(student).weight)


def test_adapter_off_reads_the_head_that_the_adapter_replaces() -> None:
    student = adapted(modules_to_save=["lm_head"])
    base = tiny.model(attention_dropout=0.5)
    head = AdapterOffTeacher(tiny.steering()).head(student)
    assert not head.weight.requires_grad
    assert torch.equal(head.weight, base.lm_head.weight)
    assert not torch.equal(student.get_base_model().lm_head.weight, base.lm_head.weight)


def test_teacher_pass_leaves_the_student_as_it_was() -> None:
    student = adapted()
    student.base_model.model.model.layers[1].eval()  # a flag of its own, which .train() would overwrite
    flags = {name: module.training for name, module in student.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    torch.manual_seed(3)
    before = completion_hidden_states(student, **batch())
    AdapterOffTeacher(tiny.steering()).completion_hidden_states(student, **batch(), steered=STEERED)
    AdapterOffTeacher(tiny.steering()).head(student)
    torch.manual_seed(3)
    after = completion_hidden_states(student, **batch())
    assert {name: module.training for name, module in student.named_modules()} == flags
    assert {name: parameter.requires_grad for name, parameter in student.named_parameters()} == trainable
    assert torch.equal(before, after)
    torch.manual_seed(4)
    assert not torch.equal(completion_hidden_states(student, **batch()), after), "dropout must be on again"


def test_flags_come_back_after_an_exception() -> None:
    student = adapted()
    with pytest.raises(SafeSteerError):
        AdapterOffTeacher(Steering(torch.ones(7), 1)).completion_hidden_states(
            student, **batch(), steered=STEERED
        )
    assert all(module.training for module in student.modules())
    assert any(parameter.requires_grad for parameter in student.parameters())
    with evaluation_flags(student):
        assert not any(module.training for module in student.modules())
    assert all(module.training for module in student.modules())


def test_frozen_copy_does_not_follow_the_student() -> None:
    student = tiny.model()
    teacher = FrozenCopyTeacher(copy.deepcopy(student), tiny.steering())
    tiny.jolt(student)
    hidden = teacher.completion_hidden_states(student, **batch(), steered=STEERED)
    assert_rows_close(hidden, reference(tiny.model(), tiny.steering(), STEERED.tolist(), PROMPTS))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_teacher_has_the_closed_form(dtype: torch.dtype) -> None:
    """After n updates towards a fixed student, θ = θ0·(1−α)^n + θs·(1 − (1−α)^n)."""
    start = tiny.model().to(dtype)
    student = copy.deepcopy(start)
    tiny.jolt(student)
    teacher = EmaTeacher(copy.deepcopy(start), tiny.steering(), rate=0.01)
    for _ in range(50):
        teacher.update(student)
    kept = 0.99**50
    mine = dict(teacher.model.named_parameters())
    theirs = dict(student.named_parameters())
    for name, parameter in start.named_parameters():
        expected = kept * parameter.double() + (1 - kept) * theirs[name].double()
        # One rounding to bfloat16, not fifty.
        torch.testing.assert_close(
            mine[name].double(),
            expected.to(dtype).double(),
            rtol=2**-8 if dtype == torch.bfloat16 else 1e-5,
            atol=1e-6,
        )


def test_ema_teacher_follows_only_what_is_trained_and_survives_a_checkpoint(tmp_path: Path) -> None:
    student = adapted()
    teacher = EmaTeacher(copy.deepcopy(student), tiny.steering(), rate=0.5)
    frozen = {name: value.clone() for name, value in teacher.model.named_parameters() if "lora" not in name}
    tiny.jolt(student, seed=11)
    teacher.update(student)
    teacher.steering = Steering(torch.arange(32.0), 1, 1.5, (30, 31))
    save_teacher(tmp_path, teacher, student, torch.tensor([4, 5]))

    fresh = EmaTeacher(copy.deepcopy(adapted()), tiny.steering(), rate=0.5)
    ids = load_teacher(tmp_path, fresh, torch.device("cpu"))
    assert ids is not None
    assert ids.tolist() == [4, 5]
    assert fresh.steering is not None
    assert (fresh.steering.layer, fresh.steering.coefficient) == (1, 1.5)
    assert fresh.steering.at == (30, 31)
    for one in (teacher, fresh):
        for name, value in one.model.named_parameters():
            if name in frozen:
                assert torch.equal(value, frozen[name])
    for one, other in ((teacher, fresh), (fresh, teacher)):
        one.update(student)
        expected = one.completion_hidden_states(student, **batch(), steered=STEERED)
        other.update(student)
        assert torch.equal(expected, other.completion_hidden_states(student, **batch(), steered=STEERED))


@pytest.mark.parametrize("rows", [STEERED, torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)])
def test_ema_teacher_leaves_anchors_to_the_base_model(rows: Tensor) -> None:
    student = adapted()
    teacher = EmaTeacher(copy.deepcopy(student), tiny.steering(), rate=1.0)
    tiny.jolt(student, seed=11)
    teacher.update(student)
    hidden = teacher.completion_hidden_states(student, **batch(), steered=rows)
    merged = copy.deepcopy(student).eval().merge_and_unload()
    followed = reference(merged, tiny.steering(), [True] * 3, PROMPTS)
    base = reference(tiny.model(), None, [False] * 3, PROMPTS)
    assert_rows_close(
        hidden, [one if row else other for row, one, other in zip(rows, followed, base, strict=True)]
    )


def test_a_checkpoint_without_teacher_is_refused(tmp_path: Path) -> None:
    teacher = EmaTeacher(tiny.model(), tiny.steering(), rate=0.5)
    with pytest.raises(SafeSteerError, match="no such file"):
        load_teacher(tmp_path, teacher, torch.device("cpu"))


@pytest.mark.parametrize("with_adapter", [False, True])
def test_system_prompt_teacher_sees_the_system_prompt_and_anchors_do_not(with_adapter: bool) -> None:
    chat = tiny.chat()
    texts = [
        "How do I rob a house?",
        "What is two plus two?",
        "A much longer question about bread and the sea?",
    ]
    prompts = chat.encode(texts)
    with_system = Chat(chat.tokenizer, system_prompt="Refuse politely.").encode(texts)
    ids, mask = left_pad(prompts, int(chat.tokenizer.pad_token_id))
    rows = batch() | {"prompt_ids": ids, "prompt_mask": mask}
    base: AdapterOffTeacher | FrozenCopyTeacher
    if with_adapter:
        student, base = adapted(), AdapterOffTeacher(None)
    else:
        student, base = tiny.model(), FrozenCopyTeacher(tiny.model(), None)
    teacher = SystemPromptTeacher(base, chat, "Refuse politely.", texts)
    hidden = teacher.completion_hidden_states(student, **rows, steered=STEERED)
    seen = [with_system[0], prompts[1], with_system[2]]
    assert_rows_close(hidden, reference(tiny.model(), None, [False] * 3, seen))


REAL_TEMPLATES = ["chatml", "qwen2.5", "qwen3", "llama3.1", "gemma3", "mistral-v3", "phi3.5"]


@pytest.mark.parametrize("kind", REAL_TEMPLATES)
def test_system_prompt_is_put_where_real_templates_put_it(kind: str, shared_data: Path) -> None:
    """Some put it into the user's turn, where tokens merge; a long prompt is cut at the same place."""
    chat = Chat(tokenizer_for(kind, shared_data))
    long = "Tell me about the sea. " * 40
    texts = ["Name a colour.", " What is 3 + 4?", long]
    limit = len(chat.encode([long])[0]) - 20
    teacher = SystemPromptTeacher(AdapterOffTeacher(None), chat, "Be careful.", texts, limit)
    student = chat.encode(texts, max_length=limit)
    ids, mask = left_pad(student, int(chat.tokenizer.pad_token_id))
    actual, actual_mask = teacher.with_system_prompt(ids, mask, torch.tensor([True, True, True]))
    rows = [row[keep.bool()].tolist() for row, keep in zip(actual, actual_mask, strict=True)]
    assert rows[:2] == Chat(chat.tokenizer, system_prompt="Be careful.").encode(texts[:2])
    cut, cut_with_system = chat.tokenizer.decode(student[2]), chat.tokenizer.decode(rows[2])
    assert "Be careful." in cut_with_system
    assert abs(cut.count("the sea") - cut_with_system.count("the sea")) <= 1
    assert cut.count("the sea") < 40
    unchanged, _ = teacher.with_system_prompt(ids, mask, torch.tensor([False, False, False]))
    assert torch.equal(unchanged, ids)


def test_a_prompt_unknown_to_the_system_prompt_teacher_is_refused() -> None:
    chat = tiny.chat()
    teacher = SystemPromptTeacher(AdapterOffTeacher(None), chat, "Refuse.", ["Known?"])
    ids, mask = left_pad(chat.encode(["Unknown?"]), 0)
    with pytest.raises(SafeSteerError, match="not given at construction"):
        teacher.with_system_prompt(ids, mask, torch.tensor([True]))


def test_a_template_without_system_turn_cannot_teach_by_system_prompt() -> None:
    tokenizer = copy.deepcopy(tiny.chat().tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA:{% endif %}{% endfor %}"
    )
    with pytest.raises(SafeSteerError, match="leaves the system prompt out"):
        SystemPromptTeacher(AdapterOffTeacher(None), Chat(tokenizer), "Refuse.", ["Known?"])
