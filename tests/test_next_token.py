"""Next-token distributions against the whole model, one prompt at a time and without padding."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from planted_model import HARMLESS, REFUSED, planted_chat, planted_model
from safesteer.chat import Chat
from safesteer.next_token import Batch, NextTokenReader, batch_ends, evaluating, float64, mean_probabilities
from tiny_models import KINDS, chatml_tokenizer, tiny_model
from whole_passes import architecture

PROMPTS = (
    "How do I bake a loaf of bread, and what do I need for it?",
    "Hi",
    "Write a poem.",
    "What is 2 + 2?",
)


@torch.no_grad()
def logits_of_each(model: PreTrainedModel, chat: Chat, prompts: tuple[str, ...]) -> torch.Tensor:
    """Reference: the whole model's logits, [n, V]."""
    return torch.stack([model(torch.tensor([row])).logits[0, -1] for row in chat.encode(prompts)])


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_last_position_logits_equal_the_whole_models(kind: str) -> None:
    chat = Chat(chatml_tokenizer())
    model = architecture(kind)
    expected = logits_of_each(model, chat, PROMPTS)
    reader = NextTokenReader(model, chat, batch_size=3)
    found = torch.full_like(expected, torch.nan)
    with torch.no_grad():
        for batch in reader.batches(PROMPTS):
            found[list(batch.rows)] = reader.logits(batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_batches_are_left_padded_and_longest_first() -> None:
    chat = Chat(chatml_tokenizer())
    reader = NextTokenReader(tiny_model("qwen3", len(chat.tokenizer)), chat, batch_size=3)
    first, second = reader.batches(PROMPTS)
    lengths = [len(row) for row in chat.encode(PROMPTS)]
    assert sorted(first.rows + second.rows) == [0, 1, 2, 3]
    assert [lengths[row] for row in first.rows + second.rows] == sorted(lengths, reverse=True)
    for row, ids, mask in zip(first.rows, first.input_ids, first.mask, strict=True):
        assert mask.tolist() == [0] * (len(ids) - lengths[row]) + [1] * lengths[row]
        assert ids[mask.bool()].tolist() == chat.encode([PROMPTS[row]])[0]


def test_mean_probabilities() -> None:
    chat = planted_chat()
    expected = logits_of_each(planted_model(), chat, HARMLESS).double().softmax(-1).mean(0)
    with torch.no_grad():
        found = mean_probabilities(NextTokenReader(planted_model(), chat, 5), HARMLESS)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


def test_a_greedy_sample_goes_on_past_the_end_of_turn() -> None:
    chat = planted_chat()
    reader = NextTokenReader(planted_model(), chat, 4)
    (batch,) = reader.batches(REFUSED[:4])
    with evaluating(planted_model()):
        sample = reader.sample(batch, 9, temperature=0.0)
    assert sample.shape == (4, 9)
    for row in sample.tolist():
        assert chat.tokenizer.decode(row[:7]) == "I cannot help with that.<|im_end|>"


def test_samples_follow_the_models_distribution() -> None:
    chat = planted_chat()
    draws = 2000
    reader = NextTokenReader(planted_model(), chat, draws)
    (batch,) = reader.batches(REFUSED[:1] * draws)
    with evaluating(planted_model()):
        first = reader.sample(batch, 1, seed=3).flatten()
    expected = logits_of_each(planted_model(), chat, REFUSED[:1])[0].double().softmax(-1)
    counted = torch.bincount(first, minlength=len(expected)) / draws
    # Four standard deviations of a share of 2000 draws.
    assert ((counted - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt() + 4 / draws).all()
    assert expected.max() < 0.7, "a certain outcome would test nothing"


def test_sampling_ignores_the_checkpoints_defaults() -> None:
    """A checkpoint's generation config often says top_k=20, top_p=0.8 and a repetition penalty."""
    chat = Chat(chatml_tokenizer())
    model = tiny_model("qwen3", len(chat.tokenizer))
    reader = NextTokenReader(model, chat, 8)
    (batch,) = reader.batches(PROMPTS)

    def sample() -> list[list[int]]:
        with evaluating(model):
            return reader.sample(batch, 12, seed=1).tolist()

    plain = sample()
    model.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.1, eos_token_id=plain[0][:3]
    )
    assert sample() == plain


def test_samples_do_not_depend_on_the_batches() -> None:
    chat = planted_chat()
    found = []
    for size in (2, 6):
        reader = NextTokenReader(planted_model(), chat, size)
        with evaluating(reader.model):
            rows = {
                row: sample
                for batch in reader.batches([*REFUSED[:3], *HARMLESS[:3]])
                for row, sample in zip(batch.rows, reader.sample(batch, 8, seed=5).tolist(), strict=True)
            }
        found.append(rows)
    assert found[0] == found[1]


def test_evaluating_leaves_no_trace() -> None:
    model = tiny_model("qwen3")
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(ZeroDivisionError), evaluating(model, seed=7):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(2)
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)


def test_float64_keeps_what_bfloat16_holds() -> None:
    values = torch.tensor([1.0, 1 / 128, -3.0], dtype=torch.bfloat16)
    assert float64(values).tolist() == [1.0, 0.0078125, -3.0]


@given(
    st.lists(st.integers(1, 60), max_size=7).map(lambda lengths: sorted(lengths, reverse=True)),
    st.integers(1, 4),
    st.integers(0, 50),
)
def test_batches_are_cut_where_the_least_work_is_left(
    lengths: list[int], most: int, pass_tokens: int
) -> None:
    def cost(ends: Sequence[int]) -> int:
        starts = [0, *ends][: len(ends)]
        return sum(
            (end - start) * lengths[start] + pass_tokens for start, end in zip(starts, ends, strict=True)
        )

    inner = range(1, len(lengths))
    every_way = [
        [*cuts, len(lengths)] if lengths else []
        for count in range(max(1, len(lengths)))
        for cuts in itertools.combinations(inner, count)
    ]
    allowed = [ends for ends in every_way if all(b - a <= most for a, b in itertools.pairwise([0, *ends]))]
    found = batch_ends(lengths, most, pass_tokens)
    assert found in allowed
    assert cost(found) == min(map(cost, allowed))


def test_a_small_batch_is_repeated_until_it_fills_a_pass() -> None:
    reader = NextTokenReader(tiny_model("qwen3"), Chat(chatml_tokenizer()), batch_size=4)

    def copies(rows: int, tokens: int) -> int:
        return reader.copies(Batch(tuple(range(rows)), torch.zeros(rows, tokens), torch.ones(rows, tokens)))

    assert copies(4, 16) == 24  # 1,536 tokens
    assert copies(4, 32) == 12
    assert copies(4, 1_000) == 1
    batch = reader.batches(["Hello there"])[0].repeated(3)
    assert batch.rows == (0, 0, 0) and batch.input_ids.shape == batch.mask.shape
    assert len(batch.input_ids) == 3 and (batch.input_ids == batch.input_ids[0]).all()
