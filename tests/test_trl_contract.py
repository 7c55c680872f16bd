"""What the trainer relies on in TRL and transformers, whose internals move; and that our loss is TRL's where
it must be.

A failure here after an upgrade says which assumption to look at first.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from torch import Tensor, nn
from transformers import Trainer
from trl import DistillationConfig, DistillationTrainer
from trl.models.utils import _ForwardRedirection

import tiny_training as tiny
from safesteer.teacher import FrozenCopyTeacher, completion_hidden_states
from safesteer.trainer import SafeSteerTrainer
from safesteer.trainer_config import SafeSteerConfig


def test_the_version_is_the_one_this_was_written_for() -> None:
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17")


@pytest.mark.parametrize(
    ("owner", "method", "parameters"),
    [
        (DistillationTrainer, "_compute_loss", ["self", "unwrapped_student", "inputs", "num_items_in_batch"]),
        (
            DistillationTrainer,
            "compute_loss",
            ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        ),
        (DistillationTrainer, "_generate_and_score_completions", ["self", "inputs"]),
        (DistillationTrainer, "_prepare_inputs", ["self", "generation_batch"]),
        (DistillationTrainer, "_tokenize_prompts", ["self", "prompts"]),
        (DistillationTrainer, "_set_signature_columns_if_needed", ["self"]),
        (DistillationTrainer, "_save_checkpoint", ["self", "model", "trial"]),
        (Trainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        (
            _ForwardRedirection,
            "__call__",
            ["self", "wrapper_module", "original_module", "method", "args", "kwargs"],
        ),
    ],
)
def test_methods_we_override_or_call_have_these_parameters(
    owner: type, method: str, parameters: list[str]
) -> None:
    assert list(inspect.signature(inspect.unwrap(getattr(owner, method))).parameters) == parameters


def test_prompts_are_tokenised_to_ids_images_and_extras_and_sampled_from_those() -> None:
    signature = inspect.signature(DistillationTrainer._generate_single_turn)
    assert list(signature.parameters)[1:4] == ["prompt_ids", "images", "multimodal_fields"]
    source = inspect.getsource(DistillationTrainer._generate)
    assert "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)" in source
    assert "self._generate_single_turn(prompt_ids, images, multimodal_fields)" in source


def test_the_loss_is_not_divided_again_for_accumulation() -> None:
    """The weights already make the sum over microbatches the step's loss."""
    assert DistillationTrainer.loss_is_scaled_for_ga is True
    assert SafeSteerTrainer.loss_is_scaled_for_ga is True


def test_a_teacher_may_be_supplied_by_a_subclass(tmp_path: Path) -> None:
    assert inspect.signature(DistillationTrainer.__init__).parameters["teacher_model"].default is None
    run = tiny.trainer(tmp_path)
    assert run.teacher_model is None
    for name in (
        "_forward_redirection",
        "_metrics",
        "_step",
        "_buffered_inputs",
        "temperature",
        "accelerator",
    ):
        assert hasattr(run, name), name


def test_settings_that_trl_names_are_still_its_own() -> None:
    theirs = set(DistillationConfig.__dataclass_fields__)
    changed = set(SafeSteerConfig.__annotations__) & theirs
    assert changed == {
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        "gradient_checkpointing",
        "bf16",
        "shuffle_dataset",
        "logging_steps",
    }
    assert {
        "beta",
        "temperature",
        "max_completion_length",
        "use_vllm",
        "top_k",
        "ds3_gather_for_generation",
    } <= theirs


def test_a_step_is_one_run_of_prompts_in_dataset_order(tmp_path: Path) -> None:
    """The layout in optimizer steps rests on the sampler's order and on one generation for each step."""
    run = tiny.trainer(tmp_path, anchor_fraction=0.5, max_steps=3)
    prompts = run.train_dataset["prompt"]
    batches = list(run.get_train_dataloader())
    assert len(batches) == 3 * run.args.gradient_accumulation_steps
    for index, batch in enumerate(batches):
        step = index // run.args.gradient_accumulation_steps
        assert [row["prompt"] for row in batch] == list(prompts[4 * step : 4 * step + 4])
        assert all(isinstance(row["steered"], bool) for row in batch)


def test_rows_of_what_we_attach_are_shuffled_and_split_with_the_responses(tmp_path: Path) -> None:
    from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

    batch = {
        "prompt_ids": torch.arange(6).reshape(6, 1),
        "steered": torch.arange(6),
        "count": torch.tensor(3),
    }
    for part in split_tensor_dict(shuffle_sequence_dict(batch), 3):
        assert torch.equal(part["prompt_ids"][:, 0], part["steered"])
        assert part["count"] == 3


KINDS = ("qwen3", "gemma3", "gpt_neox")


def other_model(kind: str) -> Any:
    teacher = tiny.model(kind)
    tiny.jolt(teacher)
    return teacher


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_trls(tmp_path: Path, kind: str) -> None:
    run = tiny.trainer(tmp_path, student=tiny.model(kind), cls=tiny.FixedResponses)
    batch = tiny.microbatches(run)[0]
    ids = [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
    theirs = run._get_last_hidden_state(
        run.model, torch.cat(ids[::2], 1), torch.cat(ids[1::2], 1), batch["completion_ids"].size(1)
    )
    keep = batch["completion_mask"].bool()
    ours = completion_hidden_states(run.model, *ids)
    torch.testing.assert_close(ours[keep], theirs[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (0.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_loss_and_gradient_are_trls_over_the_whole_vocabulary(
    tmp_path: Path, kind: str, beta: float, temperature: float
) -> None:
    """Same student, same (unsteered) teacher, same responses: TRL's chunked divergence is the reference."""

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        return {
            name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
        }

    common = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "beta": beta,
        "temperature": temperature,
    }
    ours = tiny.trainer(
        tmp_path,
        student=tiny.model(kind),
        cls=tiny.FixedResponses,
        vocabulary="full",
        reduction="token",
        train_layers="all",
        **common,
    )
    ours.teacher = FrozenCopyTeacher(other_model(kind), None)
    (batch,) = tiny.microbatches(ours)
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()

    theirs = DistillationTrainer(
        model=tiny.model(kind),
        teacher_model=other_model(kind),
        args=DistillationConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=None, **common
        ),
        train_dataset=ours.train_dataset,
        processing_class=ours.chat.tokenizer,
    )
    theirs.model.train()
    expected = theirs.compute_loss(theirs.model, batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    reference = gradients(theirs.model)
    actual = gradients(ours.model)
    assert actual.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
