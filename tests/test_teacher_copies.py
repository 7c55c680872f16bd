"""The copies of the base model that save memory, against plain copies and against NumPy's arithmetic."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny_training as tiny
from safesteer.chat import left_pad
from safesteer.divergence import localized_divergence
from safesteer.errors import SafeSteerError
from safesteer.int8_linear import Int8Linear
from safesteer.layer_offload import host_copy
from safesteer.modeling import decoder_layers
from safesteer.settings import DistillationSettings, RunSettings, Settings
from safesteer.steering import Steering
from safesteer.teacher import FrozenCopyTeacher
from safesteer.teacher_copies import offloaded_copy, quantized_copy
from safesteer.trainable_layers import freeze_below
from safesteer.training_arguments import training_arguments
from tiny_models import tiny_model

CPU = torch.device("cpu")
KINDS = ("qwen3", "gemma3", "phi3", "gpt_neox", "qwen3_moe")
STEERED = torch.tensor([True, False])
# Of a hidden state's length. Rounding to 127 levels of a row's largest weight costs 0.5 % of a map's output in
# rows of 32 normal weights, and some thirty such errors add up like a random walk: 3 %.
INT8_ERROR = 0.04


def batch(device: torch.device = CPU) -> dict[str, Tensor]:
    prompt_ids, prompt_mask = left_pad([[5, 9, 30, 31], [5, 7]], 0)
    rows = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.tensor([[40, 41, 42], [50, 51, 52]]),
        "completion_mask": torch.ones(2, 3, dtype=torch.long),
    }
    return {name: tensor.to(device) for name, tensor in rows.items()}


def hidden_states(model: nn.Module, steering: Steering | None = None, device: torch.device = CPU) -> Tensor:
    teacher = FrozenCopyTeacher(model, steering)
    return teacher.completion_hidden_states(
        nn.Identity(), **batch(device), steered=STEERED.to(device)
    )  # the student is not used


def trainable(kind: str = "qwen3", **overrides: Any) -> PreTrainedModel:
    return tiny_model(kind, **overrides).requires_grad_(True)


def dequantized(weight: Tensor) -> Tensor:
    """Round to nearest in NumPy: 255 levels per row, the largest magnitude at ±127."""
    exact = weight.detach().float().numpy()
    largest = np.abs(exact).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return torch.from_numpy(np.rint(exact / scale) * scale).to(weight.dtype)


# ---- layers in host memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steering", [None, tiny.steering()], ids=["unsteered", "steered"])
def test_offloaded_copy_is_bit_identical(kind: str, steering: Steering | None) -> None:
    student = trainable(kind)
    expected = hidden_states(copy.deepcopy(student), steering)
    copied = offloaded_copy(student, CPU)
    for _ in range(2):  # a second time too, when every layer has been there and has gone
        assert torch.equal(hidden_states(copied, steering), expected)
    if steering is not None:
        unsteered = hidden_states(copied)
        assert not torch.allclose(unsteered[0], expected[0], atol=1e-3)
        # Not to the bit: an expert multiplies the rows' tokens together, and how many it gets depends on the steered row.
        torch.testing.assert_close(unsteered[1], expected[1])


def test_only_the_running_layer_has_weights() -> None:
    student = trainable()
    copied = offloaded_copy(student, CPU)
    layers: Any = decoder_layers(copied)

    def present() -> list[int]:
        return [
            index
            for index, layer in enumerate(layers)
            if not all(weight.is_meta for weight in layer.parameters())
        ]

    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(present()))
    assert present() == []
    hidden_states(copied)
    assert seen == [[0], [1], [2], [3]]
    assert present() == []

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        hidden_states(copied)
    assert present() == []
    handle.remove()
    assert torch.equal(hidden_states(copied), hidden_states(copy.deepcopy(student)))


def test_host_copy_halves_only_what_loses_nothing() -> None:
    exact = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for weight, stored in (
        (exact, torch.float32),
        (exact.bfloat16().float(), torch.bfloat16),
        (exact.bfloat16(), torch.bfloat16),
        (exact.half(), torch.float16),
    ):
        host, dtype = host_copy(weight, pinned=False)
        assert (host.dtype, dtype) == (stored, weight.dtype)
        assert torch.equal(host.to(dtype), weight)
        assert host.data_ptr() != weight.data_ptr()


def test_offloaded_copy_of_upcast_bfloat16_weights_is_bit_identical() -> None:
    student = trainable().bfloat16().float()
    assert torch.equal(hidden_states(offloaded_copy(student, CPU)), hidden_states(copy.deepcopy(student)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_copy_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    # Layers of 20 MB, so that their transfers and computations overlap.
    sizes: Any = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 12, "head_dim": 128}
    student: Any = trainable(**sizes)
    student.to(device)
    steering = Steering(torch.randn(1024), 5)
    expected = hidden_states(copy.deepcopy(student), steering, device)
    before = torch.cuda.memory_allocated(device)
    copied = offloaded_copy(student, device)
    layer = sum(weight.numel() * weight.element_size() for weight in decoder_layers(student)[0].parameters())
    assert torch.cuda.memory_allocated(device) - before < layer, "embeddings, norm and head only"
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(5):
        assert torch.equal(hidden_states(copied, steering, device), expected)
    assert torch.cuda.max_memory_allocated(device) - before < 4 * layer


# ---- eight bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear_is_round_to_nearest(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 7, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] = 0
        linear.weight[4] *= 1e-30
        linear.weight[5, 2] = 100
    quantized = Int8Linear(linear)
    inputs = torch.randn(5, 48, dtype=dtype)
    expected = dequantized(linear.weight)
    assert torch.equal(quantized(inputs), nn.functional.linear(inputs, expected, linear.bias))
    assert torch.equal(quantized.weight, expected)
    assert quantized.quantized.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert not list(quantized.parameters()), "nothing to train"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantized(inputs)
        narrow = dequantized(linear.weight.float()).bfloat16()
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, nn.functional.linear(inputs, narrow, linear.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_int8_copy_computes_with_the_rounded_weights(kind: str) -> None:
    student = trainable(kind)
    reference = copy.deepcopy(student)
    rounded = 0
    for layer in decoder_layers(reference):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = dequantized(module.weight)
                rounded += 1
    copied = quantized_copy(student)
    assert sum(isinstance(module, Int8Linear) for module in copied.modules()) == rounded > 0
    steering = tiny.steering()
    actual = hidden_states(copied, steering)
    assert torch.equal(actual, hidden_states(reference, steering))
    exact = hidden_states(copy.deepcopy(student), steering)
    error = ((actual - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
    assert 0 < error < INT8_ERROR
    for part in ("get_input_embeddings", "get_output_embeddings"):
        theirs, mine = getattr(student, part)().weight, getattr(copied, part)().weight
        assert torch.equal(theirs, mine)
        assert theirs.data_ptr() != mine.data_ptr()


def test_int8_teacher_teaches_the_same() -> None:
    """Its divergence from the teacher in full precision is small beside what steering changes."""
    student, steering = trainable(), tiny.steering()
    exact = FrozenCopyTeacher(copy.deepcopy(student), steering)
    rounded = FrozenCopyTeacher(quantized_copy(student), steering)
    unsteered = FrozenCopyTeacher(copy.deepcopy(student), None)
    everyone = torch.ones(2, dtype=torch.bool)

    def divergence(teacher: FrozenCopyTeacher) -> float:
        hidden, reference = (
            one.completion_hidden_states(nn.Identity(), **batch(), steered=everyone).flatten(0, 1)
            for one in (teacher, exact)
        )
        heads = teacher.head(student), exact.head(student)
        weights = torch.full((len(hidden),), 1 / len(hidden))
        return localized_divergence(hidden, reference, *heads, weights, vocabulary="full").loss.item()

    assert 0 < divergence(rounded) < 0.01 * divergence(unsteered)


def test_int8_copy_takes_a_byte_per_weight() -> None:
    student = trainable()
    copied = quantized_copy(student)
    layer = decoder_layers(copied)[0]
    linears = [module for module in decoder_layers(student)[0].modules() if isinstance(module, nn.Linear)]
    norms = sum(weight.numel() for name, weight in layer.named_parameters() if "norm" in name)
    held = [*layer.parameters(), *layer.buffers()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == sum(
        module.in_features * module.out_features + 4 * module.out_features for module in linears
    ) + (4 * norms)


# ---- both --------------------------------------------------------------------------------------------------


def copied_by(kind: str, student: nn.Module) -> nn.Module:
    return offloaded_copy(student, CPU) if kind == "cpu" else quantized_copy(student)


@pytest.mark.parametrize("kind", ["cpu", "int8"])
def test_copy_shares_nothing_that_is_trained_and_all_that_is_not(kind: str) -> None:
    student = trainable()
    freeze_below(student, 2)
    frozen = {weight.data_ptr() for weight in student.parameters() if not weight.requires_grad}
    trained = {weight.data_ptr() for weight in student.parameters() if weight.requires_grad}
    copied = copied_by(kind, student)
    before = hidden_states(copied)
    mine = {weight.data_ptr() for weight in copied.parameters() if not weight.is_meta}
    assert frozen <= mine
    assert not trained & mine
    tiny.jolt(student)
    assert torch.equal(hidden_states(copied), before)
    assert not torch.allclose(hidden_states(copy.deepcopy(student)), before, rtol=0.05)
    # What teacher and student share below the steered layer must be the same bits.
    inputs = torch.tensor([[5, 9, 30, 31]])
    both: tuple[Any, Any] = (student, copied)
    with torch.no_grad():
        lower = [model.model(inputs, output_hidden_states=True).hidden_states[2] for model in both]
    assert torch.equal(*lower)


def trained(folder: Path, kind: str, **overrides: Any) -> tuple[tiny.FixedResponses, list[float]]:
    run = tiny.trainer(
        folder / kind,
        student=tiny.model(),
        cls=tiny.FixedResponses,
        teacher_copy=kind,
        max_steps=2,
        warmup_steps=0.0,
        **overrides,
    )
    assert isinstance(run, tiny.FixedResponses)
    run.train()
    return run, [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("train_layers", ["all", "from_steered"])
def test_full_fine_tuning_with_each_copy(tmp_path: Path, train_layers: str) -> None:
    runs = {kind: trained(tmp_path, kind, train_layers=train_layers) for kind in ("same", "cpu", "int8")}
    same, losses = runs["same"]
    assert runs["cpu"][1] == losses, "bit-identical teachers train bit-identical students"
    assert runs["int8"][1] == pytest.approx(losses, rel=0.05)
    base = dict(tiny.model().named_parameters())
    for kind, (run, _) in runs.items():
        teacher = run.teacher
        assert isinstance(teacher, FrozenCopyTeacher)
        assert teacher.steering is not None
        student = dict(run.model.named_parameters())
        moved = {name for name, weight in student.items() if not torch.equal(weight, base[name])}
        assert moved == {name for name, weight in student.items() if weight.requires_grad}
        if kind != "int8":
            assert all(
                torch.equal(weight, dict(same.model.named_parameters())[name])
                for name, weight in student.items()
            )
        # After training the teacher still is what it was before.
        fresh = copied_by(kind, tiny.model()) if kind != "same" else tiny.model()
        if kind == "int8" and train_layers == "from_steered":
            whole = tiny.model()
            freeze_below(whole, tiny.LAYER)
            fresh = quantized_copy(whole)
        assert torch.equal(
            hidden_states(teacher.model, teacher.steering), hidden_states(fresh, teacher.steering)
        )


@pytest.mark.parametrize("kind", ["cpu", "int8"])
def test_copy_beside_an_adapter_shares_the_base_weights(tmp_path: Path, kind: str) -> None:
    run = tiny.trainer(
        tmp_path, student=tiny.model(), peft_config=tiny.lora(), teacher="frozen_copy", teacher_copy=kind
    )
    teacher = run.teacher
    assert isinstance(teacher, FrozenCopyTeacher)
    before = {name: weight.requires_grad for name, weight in run.model.named_parameters()}
    tiny.jolt(run.model)
    expected = hidden_states(tiny.model(), teacher.steering)
    assert torch.equal(hidden_states(teacher.model, teacher.steering), expected)
    assert {name: weight.requires_grad for name, weight in run.model.named_parameters()} == before
    base = {weight.data_ptr() for name, weight in run.model.named_parameters() if "lora" not in name}
    assert base <= {weight.data_ptr() for weight in teacher.model.parameters() if not weight.is_meta}


def test_what_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    for kind in ("cpu", "int8"):
        with pytest.raises(SafeSteerError, match="teacher_copy must be same for teacher ema"):
            tiny.settings(tmp_path, teacher="ema", teacher_copy=kind)
    with pytest.raises(SafeSteerError, match="teacher_copy must be same, cpu or int8"):
        tiny.settings(tmp_path, teacher_copy="gpu")
    run = tiny.trainer(tmp_path, teacher_copy="cpu")
    run.model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(SafeSteerError, match="teacher_copy cpu cannot be made of a model that FSDP"):
        run._copy(run.model, with_adapter=False)


def test_setting_reaches_the_trainer(tmp_path: Path) -> None:
    settings = Settings(
        distillation=DistillationSettings(lora=False, teacher_copy="int8"),
        run=RunSettings(output=str(tmp_path)),
    )
    assert training_arguments(settings).teacher_copy == "int8"
