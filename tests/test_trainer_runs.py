"""Whole runs: resuming, which weights move, which teacher teaches."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import set_seed

import tiny_training as tiny
from safesteer.steering import Steering
from safesteer.trainer import SafeSteerTrainer


@pytest.mark.parametrize("variant", ["full", "lora", "ema"])
def test_resuming_gives_the_weights_of_the_uninterrupted_run(tmp_path: Path, variant: str) -> None:
    """Bit for bit: prompts, sampled responses, dropout, optimizer, schedule and EMA teacher continue."""

    def run(folder: str, max_steps: int) -> SafeSteerTrainer:
        set_seed(0)
        return tiny.trainer(
            tmp_path / folder,
            student=tiny.model(attention_dropout=0.3),
            peft_config=tiny.lora(lora_dropout=0.3) if variant == "lora" else None,
            teacher="ema" if variant == "ema" else "auto",
            ema_rate=0.3,
            anchor_fraction=0.25,
            learning_rate=0.02,
            save_strategy="steps",
            save_steps=3,
            max_steps=6,
        )

    whole = run("whole", 6)
    whole.train()
    again = run("again", 6)
    torch.manual_seed(999)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), (_, other) in zip(
        whole.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    start = tiny.model(attention_dropout=0.3)
    if variant != "lora":
        assert not torch.equal(start.lm_head.weight, whole.model.lm_head.weight), "training must move weights"
    tail = [entry["loss"] for entry in whole.state.log_history if "loss" in entry][3:]
    assert tail == [entry["loss"] for entry in again.state.log_history if "loss" in entry][3:]


def test_golden_trajectory(tmp_path: Path) -> None:
    """Plain gradient descent, which does not magnify rounding; a change here is a change of the method."""
    run = tiny.trainer(
        tmp_path,
        cls=tiny.FixedResponses,
        anchor_fraction=0.25,
        train_layers="all",
        max_steps=4,
        optim="sgd",
        learning_rate=2.0,
        warmup_steps=0,
    )
    run.train()
    log = [entry for entry in run.state.log_history if "loss" in entry]
    expected = {
        "loss": [0.00187627, 0.001123, 0.00105733, 0.00088075],
        "student_mass": [0.0107132, 0.0124978, 0.0125073, 0.0134376],
        "grad_norm": [0.0325565, 0.0144522, 0.0133145, 0.0165208],
    }
    for name, values in expected.items():
        assert [entry[name] for entry in log] == pytest.approx(values, rel=2e-3), name


def test_training_moves_the_student_to_the_teacher(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path,
        cls=tiny.FixedResponses,
        max_steps=14,
        optim="sgd",
        learning_rate=4.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    run.train()
    log = [entry for entry in run.state.log_history if "loss" in entry]
    gaps = [abs(entry["student_mass"] - entry["teacher_mass"]) for entry in log]
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    assert gaps[-1] < 0.3 * gaps[0]


@pytest.mark.parametrize("tied", [True, False])
def test_full_training_from_the_steered_layer(tmp_path: Path, tied: bool) -> None:
    student = tiny.model(tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in student.named_parameters()}
    tiny.trainer(tmp_path, student=student, train_layers="from_steered", max_steps=3, warmup_steps=0).train()
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    parts = {name.rpartition(".")[0] for name in before}
    above = {part for part in parts if part.startswith(("model.layers.2", "model.layers.3"))} | {"model.norm"}
    assert {name.rpartition(".")[0] for name in moved} == above | (set() if tied else {"lm_head"})


def test_adapter_from_the_steered_layer(tmp_path: Path) -> None:
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    configs = [
        (tiny.lora(), attention | {"gate_proj", "up_proj", "down_proj"}),
        (
            tiny.lora(target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 2]),
            {"q_proj", "up_proj"},
        ),
        (tiny.lora(target_modules=r".*\.(q_proj|o_proj)", exclude_modules=["o_proj"]), {"q_proj"}),
        (tiny.lora(exclude_modules=r".*\.mlp\..*"), attention),
    ]
    before = copy.deepcopy(configs)
    for config, expected in configs:
        run = tiny.trainer(tmp_path, peft_config=config, train_layers="from_steered")
        names = [name for name, value in run.model.named_parameters() if value.requires_grad]
        layers = {int(name.split(".layers.")[1].split(".")[0]) for name in names}
        assert layers == ({2} if config.layers_to_transform else {2, 3})
        targets = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
        assert targets == expected
        tiny.jolt(run.model)
        run.save_model(str(tmp_path / "adapter"))
        loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter")
        ids = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits)
    assert configs == before


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_sharing_the_lower_layers_changes_nothing_but_the_work(
    tmp_path: Path, adapter: bool, checkpointing: bool
) -> None:
    losses, gradients, calls = [], [], []
    for share in (True, False):
        seen = tiny.Gradients()
        run = tiny.trainer(
            tmp_path,
            cls=tiny.FixedResponses,
            peft_config=tiny.lora() if adapter else None,
            train_layers="from_steered",
            share_lower_layers=share,
            gradient_checkpointing=checkpointing,
            anchor_fraction=0.25,
            max_steps=3,
            learning_rate=0.01,
            arguments={"callbacks": [seen]},
        )
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        inner: Any = run.model.get_base_model() if adapter else run.model
        for block in inner.model.layers[: tiny.LAYER]:
            block.mlp.register_forward_hook(counted)
        run.train()
        assert not any("forward" in vars(block) for block in inner.model.layers)
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        gradients.append(seen.steps)
        calls.append(count)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(*gradients, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-7)
    passes = 3 * 2 * tiny.LAYER
    # With an adapter the counted module serves teacher and student; otherwise the student alone.
    assert calls == ([passes, 2 * passes] if adapter else [0, passes])


def test_an_existing_adapter_is_trained_on_and_its_base_teaches(tmp_path: Path) -> None:
    student = get_peft_model(tiny.model(), tiny.lora(modules_to_save=["lm_head"]))
    tiny.jolt(student)
    run = tiny.trainer(tmp_path, student=student, cls=tiny.FixedResponses)
    copied = tiny.trainer(tmp_path, student=student, cls=tiny.FixedResponses, teacher="frozen_copy")
    assert isinstance(run.model, PeftModel)
    for one, other in zip(tiny.microbatches(run), tiny.microbatches(copied), strict=True):
        expected = copied.compute_loss(copied.model, other).item()
        assert run.compute_loss(run.model, one).item() == pytest.approx(expected, rel=1e-6)


def test_ema_teacher_moves_and_is_refreshed(tmp_path: Path) -> None:
    calls: list[Tensor] = []

    def refresh(model: Any) -> tuple[Steering, list[int]]:
        calls.append(model.model.norm.weight.clone())
        return tiny.steering(layer=1, seed=len(calls)), [3, 4, 5 + len(calls)]

    run = tiny.trainer(
        tmp_path,
        teacher="ema",
        ema_rate=0.5,
        refresh_steps=2,
        max_steps=4,
        learning_rate=0.02,
        arguments={"refresh": refresh},
    )
    run.train()
    assert len(calls) == 2
    assert not torch.equal(calls[0], calls[1])
    assert run.token_ids is not None
    assert run.token_ids.tolist() == [3, 4, 7]
    teacher: Any = run.teacher
    assert teacher.steering.layer == 1
    assert torch.equal(teacher.steering.vector, tiny.steering(layer=1, seed=2).vector)


def test_system_prompt_teacher_needs_no_direction(tmp_path: Path) -> None:
    run = SafeSteerTrainer(
        tiny.model(),
        tiny.settings(tmp_path, teacher="system_prompt", vocabulary="full", anchor_fraction=0.5, max_steps=2),
        tiny.HARMFUL,
        tiny.HARMLESS,
        tiny.chat(),
        None,
        None,
    )
    run.train()
    logged = run.state.log_history[0]
    assert logged["anchor/divergence"] == pytest.approx(0.0, abs=1e-7)
    assert logged["divergence"] > 1e-3
