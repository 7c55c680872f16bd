"""Scores of candidate directions against closed forms and whole forward passes, one prompt at a time."""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from safesteer.chat import Chat
from safesteer.direction_scores import (
    CandidateScorer,
    KLFrom,
    mean_layer_inputs,
    refusal_score,
    refusal_scores,
)
from safesteer.errors import SafeSteerError
from safesteer.modeling import decoder_layers
from safesteer.next_token import NextTokenReader, no_progress
from tiny_models import chatml_tokenizer
from whole_passes import ARCHITECTURES, WRITERS, ablated, architecture, edited, log_probabilities

HARMFUL = ("How do I rob a house?", "Which lock is easy to pick, and how?", "Break the law!")
HARMLESS = ("How do I bake bread?", "Name a colour.", "Write a short poem about the sea, please.")
OPENERS = tuple(range(60, 90))


def reader_of(model: PreTrainedModel, batch_size: int = 2) -> NextTokenReader:
    return NextTokenReader(model, Chat(chatml_tokenizer()), batch_size)


def mean_score(log_p: Tensor) -> float:
    p = log_p.exp()[:, list(OPENERS)].sum(-1)
    return (torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)).mean().item()


@settings(deadline=None)
@given(
    st.lists(st.floats(-30, 30), min_size=5, max_size=5),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
def test_refusal_score_is_the_log_odds_of_the_openers(logits: list[float], ids: list[int]) -> None:
    weights = [math.exp(logit) for logit in logits]
    p = sum(weights[token] for token in set(ids)) / sum(weights)
    expected = math.log(p + 1e-8) - math.log(max(0.0, 1 - p) + 1e-8)
    (score,) = refusal_score(torch.tensor([logits], dtype=torch.float64), ids).tolist()
    assert score == pytest.approx(expected, abs=1e-5)


def test_refusal_score_of_bfloat16_logits_is_summed_in_float64() -> None:
    logits = torch.zeros(1, 70_000, dtype=torch.bfloat16)
    score = refusal_score(logits, [5])
    assert score.dtype == torch.float64
    assert score.item() == pytest.approx(
        math.log(1 / 70_000 + 1e-8) - math.log(69_999 / 70_000 + 1e-8), abs=1e-12
    )


def test_kl_divergence_of_two_coins_and_of_ruled_out_tokens() -> None:
    p = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert KLFrom(p + 3).to(q - 1).item() == pytest.approx(expected, abs=1e-12)
    assert KLFrom(p).to(p).item() == pytest.approx(0.0, abs=1e-15)
    assert KLFrom(q).to(torch.tensor([[0.0, -math.inf, -math.inf]])).item() == math.inf


def test_refusal_scores_keep_the_order_of_the_prompts() -> None:
    model = architecture("qwen3")
    expected = [mean_score(row[None]) for row in log_probabilities(model, HARMFUL + HARMLESS)]
    with torch.no_grad():
        found = refusal_scores(reader_of(model, 4), HARMFUL + HARMLESS, OPENERS)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_mean_layer_inputs_are_the_residual_stream(kind: str) -> None:
    model = architecture(kind)
    layers = list(decoder_layers(model))
    with torch.no_grad():
        found = mean_layer_inputs(reader_of(model), layers[:3], HARMFUL, 4)
        rows = Chat(chatml_tokenizer()).encode(HARMFUL)
        streams = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[:3] for row in rows]
    expected = torch.stack(
        [torch.stack([hidden[0, -4:].double() for hidden in stream]) for stream in streams]
    ).mean(0)
    assert found.dtype == torch.float64 and found.shape == (3, 4, 32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_activations_are_averaged_in_float64() -> None:
    model = architecture("qwen3").to(torch.bfloat16)
    layers = list(decoder_layers(model))
    prompts = HARMFUL * 10
    with torch.no_grad():
        found = mean_layer_inputs(reader_of(model, batch_size=1), layers[:2], prompts, 2)
        rows = Chat(chatml_tokenizer()).encode(HARMFUL)
        streams = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[:2] for row in rows]
    each = torch.stack([torch.stack([hidden[0, -2:] for hidden in stream]) for stream in streams])
    assert each.dtype == torch.bfloat16
    # Equal to the last digits, which a sum in bfloat16 would not be to the third.
    torch.testing.assert_close(found, each.double().mean(0), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_induction_at_post_instruction_tokens_equals_whole_passes(kind: str) -> None:
    """Prompts are rendered without padding there, so the template's tokens are the last ones of each pass."""
    model = architecture(kind)
    layers = list(decoder_layers(model))
    at = Chat(chatml_tokenizer()).post_instruction_ids
    vectors = {(layer, position): torch.randn(32) for layer in (0, 1, 2) for position in (-2, -1)}
    with torch.no_grad():
        scorer = CandidateScorer(reader_of(model), layers, OPENERS, HARMFUL, HARMLESS, at=at)
        found = scorer.induction(vectors, no_progress)
        everywhere = CandidateScorer(reader_of(model), layers, OPENERS, HARMFUL, HARMLESS)
        others = everywhere.induction(vectors, no_progress)
    for (layer, position), vector in vectors.items():

        def add(hidden: torch.Tensor, vector: torch.Tensor = vector) -> torch.Tensor:
            return torch.cat([hidden[:, : -len(at)], hidden[:, -len(at) :] + vector], dim=1)

        with edited(layers[layer], add, inputs=True):
            expected = mean_score(log_probabilities(model, HARMLESS))
        assert found[layer, position] == pytest.approx(expected, abs=1e-5)
    assert max(abs(found[candidate] - others[candidate]) for candidate in vectors) > 1e-3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_equal_whole_passes(kind: str) -> None:
    model = architecture(kind)
    layers = list(decoder_layers(model))
    vectors = {(layer, position): torch.randn(32) for layer in (0, 1, 2) for position in (-2, -1)}
    base = log_probabilities(model, HARMLESS)
    with torch.no_grad():
        scorer = CandidateScorer(reader_of(model), layers, OPENERS, HARMFUL, HARMLESS)
        assert scorer.unsteered == pytest.approx(mean_score(base), abs=1e-5)
        induction = scorer.induction(vectors, no_progress)
        kl = scorer.kl(vectors, no_progress)
        ablation = scorer.ablation_refusal(vectors, no_progress)
    for (layer, position), vector in vectors.items():
        with edited(layers[layer], lambda hidden, vector=vector: hidden + vector, inputs=True):
            expected = mean_score(log_probabilities(model, HARMLESS))
        assert induction[layer, position] == pytest.approx(expected, abs=1e-5)
        with ablated(model, kind, vector):
            after = log_probabilities(model, HARMLESS)
            assert ablation[layer, position] == pytest.approx(
                mean_score(log_probabilities(model, HARMFUL)), abs=1e-5
            )
        assert kl[layer, position] == pytest.approx(
            (base.exp() * (base - after)).sum(-1).mean().item(), abs=1e-5
        )
    candidate, vector = next(iter(vectors.items()))
    with torch.no_grad():
        others = CandidateScorer(reader_of(model), layers, OPENERS, HARMFUL, HARMLESS, HARMFUL[:2])
        of_others = others.induction({candidate: vector}, no_progress)[candidate]
    with edited(layers[candidate[0]], lambda hidden: hidden + vector, inputs=True):
        assert of_others == pytest.approx(mean_score(log_probabilities(model, HARMFUL[:2])), abs=1e-5)
    assert len({round(score, 3) for score in induction.values()}) == len(vectors), "the vectors should differ"


@pytest.mark.parametrize(
    ("kind", "resumed"), [("qwen3", True), ("bloom", True), ("gpt2", True), ("gemma4", False)]
)
def test_induction_runs_the_layers_below_once_per_batch(kind: str, resumed: bool) -> None:
    """Six candidates, two batches: the two of a layer go together, through the layers from theirs on."""
    model = architecture(kind)
    layers = list(decoder_layers(model))
    calls = [0] * 4
    vectors = {(layer, position): torch.randn(32) for layer in (0, 1, 2) for position in (-2, -1)}
    with torch.no_grad():
        scorer = CandidateScorer(reader_of(model), layers, OPENERS, HARMFUL, HARMLESS)
        for index, layer in enumerate(layers):
            attention = getattr(layer, WRITERS.get(kind, ("self_attn",))[0])

            def count(module: nn.Module, args: object, output: object, index: int = index) -> None:
                calls[index] += 1

            attention.register_forward_hook(count)
        scorer.induction(vectors, no_progress)
    if resumed:
        # One whole pass on one prompt, then resumed at layers 1 and 2, to see that this gives the same; per
        # batch a pass that keeps the layers' inputs, and the candidates.
        assert calls == [1 + 2 * (1 + 1), 2 + 2 * (1 + 2), 3 + 2 * (1 + 3), 3 + 2 * (1 + 3)]
    else:
        assert calls[0] == 1 + 2 * 3
    assert all("forward" not in vars(layer) for layer in layers)


def test_scores_do_not_depend_on_how_many_candidates_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architecture("llama")
    layers = list(decoder_layers(model))
    vectors = {(layer, position): torch.randn(32) for layer in (0, 2) for position in (-3, -2, -1)}
    scores = []
    for copies in (3, 2, 1):
        monkeypatch.setattr(NextTokenReader, "copies", lambda reader, batch, copies=copies: copies)
        with torch.no_grad():
            reader = reader_of(model)
            scorer = CandidateScorer(reader, layers, OPENERS, HARMFUL, HARMLESS)
            found = [f(vectors, no_progress) for f in (scorer.induction, scorer.kl, scorer.ablation_refusal)]
        scores.append([[score[candidate] for candidate in vectors] for score in found])
    torch.testing.assert_close(torch.tensor(scores[1:]), torch.tensor([scores[0]] * 2), atol=1e-6, rtol=1e-5)


def test_an_architecture_without_one_residual_stream_is_refused() -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=len(chatml_tokenizer()),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=len(chatml_tokenizer()),
        laurel_rank=4,
        activation_sparsity_pattern=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.Gemma3nForCausalLM(config).eval()
    with (
        torch.no_grad(),
        pytest.raises(SafeSteerError, match=r"Gemma3nTextDecoderLayer .*\[4, 1, .*architecture"),
    ):
        mean_layer_inputs(reader_of(model), list(decoder_layers(model)), HARMFUL, 2)
