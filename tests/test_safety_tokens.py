"""Safety tokens: on a model in which they are known, against brute force on random ones, saved and loaded."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from planted_model import ANSWERED, HARMLESS, REFUSE, planted_chat, planted_model, token_id
from safesteer.chat import Chat
from safesteer.errors import SafeSteerError
from safesteer.modeling import Head, decoder_layers, model_fingerprint
from safesteer.safety_tokens import (
    SafetyTokens,
    SafetyTokenSettings,
    find_safety_tokens,
    safety_tokens_fingerprint,
    select_safety_tokens,
)
from safesteer.steering import Steering
from tiny_models import chatml_tokenizer
from whole_passes import architecture

TOWARDS_REFUSAL = Steering(2.0 * torch.eye(32)[REFUSE], 1, 1.0)
PROMPTS = ("How do I bake bread?", "Name a colour.", "Write about the sea, please.")


@pytest.fixture(scope="module")
def planted() -> SafetyTokens:
    settings = SafetyTokenSettings(votes_per_position=2, samples=4, batch_size=10)
    return find_safety_tokens(planted_model(), planted_chat(), HARMLESS[:5], TOWARDS_REFUSAL, settings)


def test_the_planted_openers_are_the_safety_tokens(planted: SafetyTokens) -> None:
    assert [token.text for token in planted.tokens] == ["I", "Sorry"]
    assert planted.ids == [token_id("I"), token_id("Sorry")]
    assert {token.votes for token in planted.tokens} == {planted.counted_positions}
    # Steering adds 2·2 and 1.85·2 times √32 / |h| to their logits, and |h| is √5 for the teacher, 1 before.
    for token, gain in zip(planted.tokens, (2.0, 1.85), strict=True):
        assert token.mean_delta > 5 * gain
        assert token.teacher_probability > 20 * token.base_probability


def test_positions_stop_counting_where_the_base_model_ends_its_turn() -> None:
    """A position after "that." predicts the end of the turn; nothing that follows it counts."""
    settings = SafetyTokenSettings(votes_per_position=2, samples=1, horizon=12)
    sampled: list[list[int]] = []
    model = planted_model()
    generate = model.generate

    def remembered(*args: object, **kwargs: object) -> Tensor:
        output = generate(*args, **kwargs)
        sampled.extend(output.tolist())
        return output

    model.generate = remembered  # type: ignore[method-assign]
    try:
        tokens = find_safety_tokens(model, planted_chat(), HARMLESS, TOWARDS_REFUSAL, settings)
    finally:
        del model.generate
    stop = token_id(".")
    responses = [row[-11:] for row in sampled]
    # The full stop is predicted, and counted; the position that reads it is the first that is not.
    expected = sum(row.index(stop) + 1 if stop in row else 12 for row in responses)
    assert len(responses) == len(HARMLESS) and 5 * 16 < expected < 12 * 16
    assert tokens.counted_positions == expected


class BruteForce:
    """Method §3 word for word on whole [N, H, V] tensors, for the trajectories that were sampled."""

    def __init__(self, model: PreTrainedModel, rows: list[Tensor], steering: Steering, horizon: int) -> None:
        ends = [chatml_tokenizer().eos_token_id]

        @torch.no_grad()
        def log_probabilities() -> Tensor:
            every = [model(row[None]).logits[0, -horizon:].double().log_softmax(-1) for row in rows]
            return torch.stack(every)

        base = log_probabilities()
        layer = decoder_layers(model)[steering.layer]
        shift = steering.coefficient * steering.vector
        handle = layer.register_forward_pre_hook(
            lambda module, args: (args[0] + shift, *args[1:]),
        )
        teacher = log_probabilities()
        handle.remove()
        ended = torch.isin(base.argmax(-1), torch.tensor(ends)).int().cumsum(1) > 0
        self.teacher, self.base = teacher[~ended], base[~ended]  # [positions, V]
        self.delta = self.teacher - self.base

    def select(self, settings: SafetyTokenSettings, banned: Tensor) -> tuple[list[int], Tensor]:
        banned = banned | (self.teacher.exp().mean(0) < settings.minimum_probability)
        delta = self.delta.masked_fill(banned, -math.inf)
        votes = torch.zeros(delta.shape[1], dtype=torch.int64)
        for position in delta:
            votes[position.argsort(descending=True)[: settings.votes_per_position]] += 1
        votes[banned] = 0
        mean = self.delta.mean(0)
        if settings.selection == "vote":
            ranked = sorted(
                (v for v in range(len(votes)) if votes[v]), key=lambda v: (-votes[v], -mean[v], v)
            )
        else:
            ranked = sorted((v for v in range(len(votes)) if not banned[v]), key=lambda v: (-mean[v], v))
        return ranked[: settings.size], votes


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {}),
        ("gemma3", {"votes_per_position": 3}),
        ("qwen3", {"selection": "mean", "minimum_probability": 2e-3}),
        ("qwen3_moe", {"minimum_probability": 3e-3, "size": 400, "votes_per_position": 500}),
        ("gpt_neox", {"horizon": 1}),
    ],
)
def test_tokens_equal_brute_force(kind: str, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(
        SafetyTokenSettings(horizon=5, votes_per_position=20, size=12, samples=3, batch_size=4, seed=9),
        **changes,
    )
    model, chat = architecture(kind), Chat(chatml_tokenizer())
    steering = Steering(torch.randn(32), 2, 1.5)
    trajectories: list[Tensor] = []
    generate = model.generate

    def remembered(**kwargs: Tensor) -> Tensor:
        output = generate(**kwargs)
        masks = torch.cat(
            [kwargs["attention_mask"], torch.ones(len(output), settings.horizon - 1)], dim=1
        ).bool()
        trajectories.extend(row[mask] for row, mask in zip(output, masks, strict=True))
        return output

    monkeypatch.setattr(model, "generate", remembered)
    found = find_safety_tokens(model, chat, PROMPTS, steering, settings)
    if settings.horizon == 1:  # nothing to sample
        trajectories = [torch.tensor(row) for row in chat.encode(PROMPTS) for _ in range(3)]
    assert len(trajectories) == 9
    expected = BruteForce(model, trajectories, steering, settings.horizon)
    banned = torch.zeros(len(chat.tokenizer), dtype=torch.bool)
    banned[chat.tokenizer.all_special_ids] = True
    banned[token_id("<|im_start|>")] = True  # special, though none of the tokenizer's named ones
    ids, votes = expected.select(settings, banned)
    assert found.counted_positions == len(expected.delta)
    assert found.ids == ids
    for token in found.tokens:
        assert token.votes == votes[token.id]
        assert token.teacher_probability == pytest.approx(
            expected.teacher.exp().mean(0)[token.id].item(), rel=1e-4
        )
        assert token.base_probability == pytest.approx(expected.base.exp().mean(0)[token.id].item(), rel=1e-4)
        assert token.mean_delta == pytest.approx(expected.delta.mean(0)[token.id].item(), abs=1e-4)
        assert token.text == chat.tokenizer.decode([token.id])
    if "size" in changes:
        assert 12 < len(ids) < 400, "the probability ban should leave fewer than asked for"


def test_a_padded_vocabulary_and_special_tokens_are_never_chosen() -> None:
    chat = Chat(chatml_tokenizer())
    model = architecture("qwen3")
    model.resize_token_embeddings(len(chat.tokenizer) + 34)
    settings = SafetyTokenSettings(samples=1, size=1000, votes_per_position=1000, minimum_probability=0.0)
    found = find_safety_tokens(model, chat, PROMPTS, Steering(torch.randn(32), 2, 2.0), settings)
    special = {token_id(text) for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
    assert set(found.ids) == set(range(len(chat.tokenizer))) - special


def test_no_tensor_of_all_positions_and_the_vocabulary_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 trajectories of 7 positions over 430 tokens; the head sees 6 positions at a time at most."""
    sizes = []
    logits = Head.logits

    def measured(self: Head, hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[:-1].numel())
        return logits(self, hidden)

    monkeypatch.setattr(Head, "logits", measured)
    settings = SafetyTokenSettings(samples=16, batch_size=6)
    find_safety_tokens(planted_model(), planted_chat(), HARMLESS[:3], TOWARDS_REFUSAL, settings)
    assert max(sizes) == 6


_ROWS = st.lists(st.tuples(st.integers(0, 3), st.floats(-2, 2), st.booleans()), min_size=1, max_size=12)


@settings(deadline=None)
@given(_ROWS, st.integers(1, 12))
def test_selection_ranks_by_votes_then_delta(rows: list[tuple[int, float, bool]], size: int) -> None:
    votes, banned = (torch.tensor([row[column] for row in rows]) for column in (0, 2))
    delta = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    chosen = select_safety_tokens(votes, delta, banned, size=size, selection="vote")
    keys = [(-rows[token][0], -rows[token][1]) for token in chosen]
    allowed = [token for token, (count, _, ban) in enumerate(rows) if count and not ban]
    assert keys == sorted(keys) and len(chosen) == len(set(chosen)) == min(size, len(allowed))
    left_out = [(-rows[token][0], -rows[token][1]) for token in set(allowed) - set(chosen)]
    assert not keys or all(key >= keys[-1] for key in left_out)
    by_mean = select_safety_tokens(votes, delta, banned, size=size, selection="mean")
    free = [row[1] for row in rows if not row[2]]
    assert [rows[token][1] for token in by_mean] == sorted(free, reverse=True)[:size]


def test_it_is_reproducible_and_leaves_no_trace(planted: SafetyTokens) -> None:
    told: list[tuple[str, int, int]] = []
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    again = find_safety_tokens(
        planted_model(),
        planted_chat(),
        HARMLESS[:5],
        TOWARDS_REFUSAL,
        planted.settings,
        progress=lambda *progress: told.append(progress),
    )
    assert again == planted
    assert torch.equal(torch.rand(1), expected)
    sampling = [entry for entry in told if entry[0] == "teacher trajectories"]
    assert sampling == [("teacher trajectories", 10, 20), ("teacher trajectories", 20, 20)]
    assert told[-1] == ("votes", planted.counted_positions, planted.counted_positions)


def test_a_bfloat16_model() -> None:
    model = architecture("qwen3").to(torch.bfloat16)
    settings = SafetyTokenSettings(samples=2, size=5)
    found = find_safety_tokens(
        model, Chat(chatml_tokenizer()), PROMPTS, Steering(torch.randn(32), 1, 2.0), settings
    )
    assert len(found.ids) == 5 and found.counted_positions > 0
    assert all(0 < token.teacher_probability < 1 and token.mean_delta > 0 for token in found.tokens)


def test_no_prompts() -> None:
    with pytest.raises(SafeSteerError, match="safety tokens need harmless prompts and got none"):
        find_safety_tokens(planted_model(), planted_chat(), (), TOWARDS_REFUSAL)


def test_a_model_that_says_nothing() -> None:
    model = architecture("qwen3")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.get_output_embeddings().weight[chatml_tokenizer().eos_token_id] = 1.0
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.get_input_embeddings().weight[:, 0] = 30.0
    with pytest.raises(SafeSteerError, match="ends its turn at once after each of the 3 harmless prompts"):
        find_safety_tokens(model, Chat(chatml_tokenizer()), PROMPTS, Steering(torch.zeros(32), 1, 1.0))


def test_a_ban_that_leaves_nothing() -> None:
    settings = SafetyTokenSettings(samples=1, minimum_probability=0.9)
    with pytest.raises(
        SafeSteerError, match="no ordinary token a mean probability of 0.9 or more; lower --tokens-min"
    ):
        find_safety_tokens(planted_model(), planted_chat(), HARMLESS[:2], TOWARDS_REFUSAL, settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"horizon": 0}, "safety_tokens.horizon is 0; give a whole number from 1"),
        ({"size": 0}, "safety_tokens.size is 0"),
        ({"minimum_probability": 1.0}, "safety_tokens.minimum_probability is 1.0"),
        ({"selection": "best"}, "safety_tokens.selection is 'best'; give vote or mean"),
    ],
)
def test_settings_out_of_range(changes: dict, said: str) -> None:
    with pytest.raises(SafeSteerError) as error:
        SafetyTokenSettings(**changes)
    assert str(error.value).startswith(said)


def test_every_setting_is_documented() -> None:
    assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(SafetyTokenSettings))


def test_saved_and_loaded(planted: SafetyTokens, tmp_path: Path) -> None:
    planted.save(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["safety_tokens.json"]
    assert SafetyTokens.load(tmp_path / "run") == planted


def test_damaged_files(planted: SafetyTokens, tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError, match="safety_tokens.json: no such file"):
        SafetyTokens.load(tmp_path)
    planted.save(tmp_path)
    record = json.loads((tmp_path / "safety_tokens.json").read_text())
    for changes in (
        {"tokens": []},
        {"tokens": [{"id": 1}]},
        {"settings": {"horizon": "x"}},
        {"settings": 3},
        {"more": 1},
    ):
        (tmp_path / "safety_tokens.json").write_text(json.dumps({**record, **changes}))
        with pytest.raises(SafeSteerError, match="safety_tokens.json: is not a whole set of safety tokens"):
            SafetyTokens.load(tmp_path)
    (tmp_path / "safety_tokens.json").write_text("{")
    with pytest.raises(SafeSteerError, match="cannot be read as JSON"):
        SafetyTokens.load(tmp_path)


def test_another_models_tokens_are_refused(planted: SafetyTokens) -> None:
    planted.require_model(model_fingerprint(planted_model()))
    with pytest.raises(SafeSteerError, match="the safety tokens were found on another model"):
        planted.require_model(model_fingerprint(architecture("qwen3")))


def test_the_fingerprint_covers_what_the_tokens_depend_on(planted: SafetyTokens) -> None:
    base = {
        "model": planted.model_fingerprint,
        "chat": planted_chat(),
        "prompts": HARMLESS[:5],
        "steering": TOWARDS_REFUSAL,
        "settings": planted.settings,
    }
    assert safety_tokens_fingerprint(**base) == planted.fingerprint
    changes = {
        "model": "n",
        "chat": dataclasses.replace(planted_chat(), system_prompt="Be brief."),
        "prompts": ANSWERED,
        "steering": dataclasses.replace(TOWARDS_REFUSAL, coefficient=2.0),
        "settings": SafetyTokenSettings(),
    }
    prints = {safety_tokens_fingerprint(**{**base, name: value}) for name, value in changes.items()}
    other_vector = dataclasses.replace(TOWARDS_REFUSAL, vector=TOWARDS_REFUSAL.vector * 2)
    prints |= {planted.fingerprint, safety_tokens_fingerprint(**{**base, "steering": other_vector})}
    assert len(prints) == 7
