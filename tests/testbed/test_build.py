"""Building a (much smaller) testbed: resumes to the same weights, loads as any chat model, and the committed one is sound."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from safesteer.chat import Chat
from safesteer.loading import load_model, load_tokenizer
from safesteer.testbed.batches import IGNORED, ChatBatches
from safesteer.testbed.build import (
    BuildSettings,
    DecisionTrainer,
    build,
    decision_loss,
    harm_directions,
    new_model,
    train_tokenizer,
    widened,
)
from safesteer.testbed.corpus import HARMS, ChatStream, Mixture, tokenizer_texts
from safesteer.testbed.demo import testbed_folder as bundled

TINY = BuildSettings(
    steps=4,
    batch_size=4,
    warmup_steps=1,
    vocabulary=600,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
)


def test_an_interrupted_build_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", None, TINY, save_steps=2, logging_steps=1)
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-2"
    shutil.copytree(checkpoint, tmp_path / "cut" / "checkpoints" / "checkpoint-2")
    cut = build(tmp_path / "cut", None, TINY, save_steps=2, logging_steps=1)
    expected, found = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    log = [json.loads(line) for line in (whole / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]


def test_a_build_can_begin_with_other_weights(tmp_path: Path) -> None:
    first = build(tmp_path / "first", None, TINY)
    still = dataclasses.replace(TINY, learning_rate=0.0, seed=1)
    found = build(tmp_path / "second", None, still, first)
    expected = load_file(first / "model.safetensors")
    for name, tensor in load_file(found / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert (found / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()


def test_a_build_widens_what_it_begins_with(tmp_path: Path) -> None:
    """The wider model says what the narrow one said, and its new units learn."""
    first = build(tmp_path / "first", None, TINY)
    narrow = load_model(str(first), device="cpu")
    wide = widened(narrow, 96)
    ids = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(wide(ids).logits, narrow(ids).logits)
    assert wide.lm_head.weight is wide.model.embed_tokens.weight
    found = load_file(
        build(tmp_path / "second", None, dataclasses.replace(TINY, intermediate_size=96), first)
        / "model.safetensors"
    )
    new_units = found["model.layers.0.mlp.down_proj.weight"][:, 64:]
    assert new_units.shape == (32, 32)
    assert new_units.count_nonzero()


def test_a_build_can_compile_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not really, that needs a compiler and half a minute: they are asked to, and their weights keep their names."""
    asked: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: asked.append(type(self).__name__))
    folder = build(tmp_path, None, TINY, compiled=True)
    assert asked == ["Qwen3DecoderLayer"] * TINY.layers
    assert load_model(str(folder), device="cpu").num_parameters()


def test_a_built_testbed_loads_as_any_chat_model(tmp_path: Path) -> None:
    folder = build(tmp_path, None, TINY)
    chat = Chat(load_tokenizer(str(folder)))
    pieces = chat.tokenizer.convert_ids_to_tokens(chat.post_instruction_ids)
    assert pieces == ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]
    model = load_model(str(folder), device="cpu")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.generation_config.eos_token_id == chat.tokenizer.eos_token_id


@pytest.fixture(scope="module")
def committed() -> Path:
    return bundled() / "model"


def test_the_committed_weights_are_small_and_plain(committed: Path) -> None:
    assert (committed / "model.safetensors").stat().st_size <= 20e6
    weights = load_file(committed / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) <= 10e6
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = json.loads((committed / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    recipe = json.loads((committed / "recipe.json").read_text())
    assert recipe["parameters"] == sum(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_the_first_token_of_a_response_counts_as_often_as_asked(weight: float) -> None:
    """Against a sum token by token in float64: the third and the fourth token decide."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 7, generator=generator), torch.tensor([4, 0, 6, 3, 1, 5])
    first = torch.rand(2, 7, generator=generator).softmax(-1)
    log_p = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    total = -sum(log_p[i, labels[i]] for i in (0, 1, 4, 5))
    for i, row in zip((2, 3), first.double(), strict=True):
        total -= weight * sum(row[token] * log_p[i, token] for token in range(7))
    decides = torch.tensor([False, False, True, True, False, False])
    found = decision_loss(logits, labels, decides, first, weight)
    torch.testing.assert_close(found.double(), total / (4 + 2 * weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("passages", [0.0, 1.0])
def test_training_minimises_the_loss_over_the_whole_batch(passages: float) -> None:
    """The trainer's loss, of the learnt tokens' logits alone, against one from the logits of every token."""
    chats = ChatStream(Mixture(prompt_loss=0.3, passages=passages))
    tokenizer = train_tokenizer(tokenizer_texts(chats, 300, 0, None), 600)
    batch = ChatBatches(chats, tokenizer, steps=1, batch_size=32, seed=0)[0]
    torch.manual_seed(0)
    model = new_model(tokenizer, TINY)
    read = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with torch.no_grad():
        log_p = model(**read).logits.double().log_softmax(-1)
        hidden = model.model(**read).last_hidden_state.double()
    of_kinds = (hidden @ harm_directions(TINY.hidden_size).double().T).log_softmax(-1)
    total, count, kinds = 0.0, 0, []
    decided = zip(batch["first"].double(), batch["harms"].tolist(), strict=True)
    for row, labels in enumerate(batch["labels"].tolist()):
        for at in range(1, len(labels)):
            if labels[at] == IGNORED:
                continue
            if labels[at - 1] == IGNORED:
                first, harm = next(decided)
                total -= 3 * float((first * log_p[row, at - 1]).sum())
                count += 3
                if harm != IGNORED:
                    kinds.append(-float(of_kinds[row, at - 1, harm]))
            else:
                total -= float(log_p[row, at - 1, labels[at]])
                count += 1
    assert not list(decided)
    assert len(kinds) > 3
    settings = dataclasses.replace(TINY, first_token_weight=3.0, harm_weight=0.7)
    trainer = DecisionTrainer(settings, model=model, args=TrainingArguments(report_to="none"))
    found = trainer.compute_loss(model, batch).detach()
    assert float(found) == pytest.approx(total / count + 0.7 * sum(kinds) / len(kinds), rel=1e-5)


def test_the_directions_of_harm_are_orthonormal_and_always_the_same() -> None:
    directions = harm_directions(32)
    torch.testing.assert_close(directions @ directions.T, torch.eye(len(HARMS)))
    assert torch.equal(directions, harm_directions(32))
