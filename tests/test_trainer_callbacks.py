"""What is watched, logged and stopped during training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import tiny_training as tiny
from planted_model import ANSWERED, HARMLESS, REFUSED, planted_model
from safesteer.errors import SafeSteerError
from safesteer.trainer_callbacks import ProbeSets, sampling_seed


def test_probe_logs_the_refusal_rates(tmp_path: Path) -> None:
    """Of a model that is known to refuse three of these four; its weights stay, as the learning rate is 0."""
    model = copy.deepcopy(planted_model())
    harmful, harmless = (*REFUSED[:3], ANSWERED[0]), HARMLESS[:2]
    run = tiny.trainer(
        tmp_path,
        student=model,
        learning_rate=0.0,
        max_steps=5,
        probe_steps=2,
        probe_tokens=8,
        arguments={"probe": ProbeSets(harmful, harmless)},
    )
    run.train()
    assert run.probe_callback is not None
    found = [(r.step, r.harmful_refusal_rate, r.harmless_refusal_rate) for r in run.probe_callback.results]
    assert found == [(0, 0.75, 0.0), (2, 0.75, 0.0), (4, 0.75, 0.0), (5, 0.75, 0.0)]
    name = "probe/harmful_refusal_rate"
    logged = {entry["step"]: entry[name] for entry in run.state.log_history if name in entry}
    assert logged == {0: 0.75, 2: 0.75, 4: 0.75, 5: 0.75}


def test_probing_does_not_change_the_training(tmp_path: Path) -> None:
    losses = []
    for every in (0, 1):
        probe = ProbeSets(tiny.HARMFUL[:2], tiny.HARMLESS[:2]) if every else None
        run = tiny.trainer(
            tmp_path,
            student=tiny.model(attention_dropout=0.5),
            max_steps=3,
            probe_steps=every,
            probe_tokens=4,
            arguments={"probe": probe},
        )
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_tensorboard_gets_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = tiny.trainer(tmp_path, anchor_fraction=0.5, max_steps=3, report_to="tensorboard")
    run.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("loss", "student_mass", "teacher_mass", "kl_on", "kl_off", "entropy", "anchor/divergence"):
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        expected = {entry["step"]: entry[name] for entry in run.state.log_history if name in entry}
        assert written.keys() == {1, 2, 3}
        assert written == pytest.approx(expected, rel=1e-5)
    assert len(events.Scalars("train/completions/mean_length")) == 3


class Poison(TrainerCallback):
    """Makes weights NaN after two optimizer steps."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                kwargs["model"].model.norm.weight.fill_(float("nan"))


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_loss_that_is_not_finite_stops_training_and_names_the_checkpoint(
    tmp_path: Path, checkpoint: bool
) -> None:
    run = tiny.trainer(
        tmp_path / "out",
        cls=tiny.FixedResponses,
        save_strategy="steps" if checkpoint else "no",
        save_steps=1,
        max_steps=5,
        arguments={"callbacks": [Poison()]},
    )
    with pytest.raises(SafeSteerError) as caught:
        run.train()
    assert "loss became nan at step 3" in str(caught.value)
    assert run.state.global_step == 2
    last = tmp_path / "out" / "checkpoint-2"
    assert last.is_dir() == checkpoint
    assert (f"last good checkpoint is {last}" if checkpoint else "no checkpoint") in str(caught.value)


def test_a_gradient_that_is_not_finite_stops_training_before_it_moves_weights(tmp_path: Path) -> None:
    student = tiny.model()
    run = tiny.trainer(tmp_path, student=student, cls=tiny.FixedResponses, max_steps=2, warmup_steps=0)
    student.model.norm.weight.register_hook(lambda gradient: gradient / 0)
    before = {name: value.clone() for name, value in student.named_parameters()}
    with pytest.raises(SafeSteerError, match="gradient norm became (inf|nan) at step 1"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())


def test_sampling_seed_gives_each_combination_its_own_stream() -> None:
    def draw(*seed: int) -> float:
        with sampling_seed(torch.device("cpu"), *seed):
            return torch.rand(()).item()

    draws = [draw(1, 2, 3), draw(1, 2, 4), draw(1, 3, 3), draw(12, 3), draw(1, 23), draw(3, 2, 1)]
    assert len(set(draws)) == len(draws)
    assert draw(1, 2, 3) == draws[0]
