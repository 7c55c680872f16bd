"""The refusal direction: where it is known, and against brute force on random models."""

import dataclasses
import math
import statistics
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from planted_model import (
    ANSWERED,
    HARMLESS,
    REFUSE,
    REFUSED,
    planted_chat,
    planted_direction,
    planted_model,
    token_id,
)
from safesteer.chat import Chat
from safesteer.direction import (
    DirectionSettings,
    RefusalDirection,
    direction_fingerprint,
    find_refusal_direction,
)
from safesteer.direction_prompts import sampled_prompts
from safesteer.direction_scores import refusal_scores
from safesteer.errors import SafeSteerError
from safesteer.next_token import NextTokenReader
from safesteer.prompts import PromptSet
from safesteer.steering import Steering
from tiny_models import chatml_tokenizer
from whole_passes import BruteForceDirection, architecture, log_probabilities

PLANTED_HARMFUL = PromptSet(REFUSED + ANSWERED, "harmful.txt")
PLANTED_HARMLESS = PromptSet(HARMLESS, "harmless.txt")
WORDS = ("house", "lock", "law", "bread", "sea", "poem", "colour", "loaf", "capital", "salt")
RANDOM_HARMFUL = PromptSet(tuple(f"How do I rob or break the {word}?" for word in WORDS), "harmful.txt")
RANDOM_HARMLESS = PromptSet(tuple(f"Write about {word}, please." for word in WORDS), "harmless.txt")
SIZES = {"train_harmful": 6, "train_harmless": 6, "validation_harmful": 4, "validation_harmless": 4}


@pytest.fixture(scope="module")
def planted() -> RefusalDirection:
    return planted_direction()


def test_the_planted_direction_is_found(planted: RefusalDirection) -> None:
    assert planted.vector.dtype == torch.float32
    axis = torch.eye(32)[REFUSE]
    assert torch.cosine_similarity(planted.vector, axis, dim=0).item() == pytest.approx(1.0, abs=1e-6)
    assert planted.layer in (1, 2)  # written by layer 0, and nothing is read from layer 3
    assert planted.openers.ids == (token_id("I"), token_id("Sorry"))
    assert planted.relaxed is None
    # 4·√32 times the share of " rob" among the tokens up to where it was read: of 15 for most prompts.
    assert planted.vector[REFUSE].item() == pytest.approx(
        4 * math.sqrt(32) / (16 + planted.position), rel=0.01
    )


def test_the_coefficient_flips_what_the_model_answers(planted: RefusalDirection) -> None:
    """With c = 1 harmless prompts are refused, as the induction test asks, but not those that get "Write"."""
    assert planted.coefficient == 1.5
    assert planted.flip_rate == 1.0
    assert [(trial.coefficient, trial.flip_rate) for trial in planted.coefficient_trials] == [
        (1.0, 0.0),
        (1.5, 1.0),
    ]
    assert planted.steering.layer == planted.layer
    assert planted.steering.coefficient == 1.5
    assert torch.equal(planted.steering.vector, planted.vector)


def test_it_is_told_what_was_used(planted: RefusalDirection) -> None:
    samples = sampled_prompts(PLANTED_HARMFUL, PLANTED_HARMLESS, DirectionSettings(**{
        "train_harmful": 14, "validation_harmful": 6, "train_harmless": 10, "validation_harmless": 6
    }))  # fmt: skip
    assert planted.sampled == {name: len(prompts) for name, prompts in samples.items()}
    refused = {name: sum(prompt in REFUSED for prompt in prompts) for name, prompts in samples.items()}
    assert planted.filtered == {
        "train_harmful": refused["train_harmful"],
        "validation_harmful": refused["validation_harmful"],
        "train_harmless": 10,
        "validation_harmless": 6,
    }
    assert (planted.flip_prompts, planted.flip_answered) == ("harmful", 6 - refused["validation_harmful"])
    assert planted.validation_harmless == samples["validation_harmless"]
    verdicts = {(score.layer, score.position): score.verdict for score in planted.candidates}
    assert set(verdicts) == {(layer, position) for layer in range(4) for position in range(-5, 0)}
    assert {verdicts[0, position] for position in range(-5, 0)} == {
        "no difference between harmful and harmless"
    }
    assert {verdicts[3, position] for position in range(-5, 0)} == {"layer ≥ 0.8 L"}
    assert verdicts[planted.layer, planted.position] == "selected"


def test_every_stage_tells_its_progress() -> None:
    told: list[tuple[str, int, int]] = []
    settings = DirectionSettings(coefficient=1.0, batch_size=64)
    find_refusal_direction(
        planted_model(),
        planted_chat(),
        PLANTED_HARMFUL,
        PLANTED_HARMLESS,
        settings,
        progress=lambda doing, done, total: told.append((doing, done, total)),
    )
    stages = list(dict.fromkeys(doing.split(":")[0] for doing, _, _ in told))
    assert stages == [
        "refusal openers",
        "filter",
        "activations",
        "induction",
        "KL",
        "ablation",
        "coefficient",
    ]
    for stage in stages:
        last = [(done, total) for doing, done, total in told if doing.split(":")[0] == stage][-1]
        assert last[0] == last[1] > 0


def unfiltered(**changes: object) -> DirectionSettings:
    return dataclasses.replace(
        DirectionSettings(filter_prompts=False, coefficient=1.0, batch_size=4, seed=5, **SIZES), **changes
    )


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt_neox", "gpt2", "bloom"])
def test_choice_and_scores_equal_brute_force(kind: str) -> None:
    model = architecture(kind)
    openers = tuple(range(40, 120))
    samples = sampled_prompts(RANDOM_HARMFUL, RANDOM_HARMLESS, unfiltered())
    expected = BruteForceDirection(model, kind, openers, samples)
    # Thresholds amid the scores, so that every test discards some.
    middle = statistics.median(induction for induction, _, _ in expected.scores.values()) - 1e-4
    inducing = [kl for induction, kl, _ in expected.scores.values() if induction >= middle]
    thresholds = {"max_kl": statistics.median(inducing) + 1e-4, "min_induction": middle}
    found = find_refusal_direction(
        model,
        Chat(chatml_tokenizer()),
        RANDOM_HARMFUL,
        RANDOM_HARMLESS,
        unfiltered(refusal_token_ids=openers, fallback="error", **thresholds),
    )
    assert (found.layer, found.position) == expected.choice(**thresholds)
    chosen = expected.vectors[found.layer, found.position]
    torch.testing.assert_close(found.vector, chosen, atol=1e-5, rtol=1e-5)
    scored = {
        (score.layer, score.position): score for score in found.candidates if not math.isnan(score.induction)
    }
    assert set(scored) == set(expected.scores)
    for candidate, score in scored.items():
        induction, kl, ablation = expected.scores[candidate]
        passes_cheap_tests = induction >= thresholds["min_induction"], kl <= thresholds["max_kl"]
        assert score.induction == pytest.approx(induction, abs=1e-5)
        if passes_cheap_tests[0]:
            assert score.kl == pytest.approx(kl, abs=1e-5)
        if all(passes_cheap_tests):
            assert score.ablation_refusal == pytest.approx(ablation, abs=1e-5)
        assert (score.verdict in ("selected", "eligible")) == all(passes_cheap_tests)
    verdicts = {score.verdict.split()[0] for score in found.candidates}
    assert {"selected", "kl", "induction", "layer"} <= verdicts


def test_the_filter_equals_brute_force() -> None:
    model = architecture("qwen3")
    samples = sampled_prompts(RANDOM_HARMFUL, RANDOM_HARMLESS, unfiltered())
    # Tokens with half of the mass, chosen so that every other prompt has more of it on them, the rest less.
    p = log_probabilities(model, RANDOM_HARMFUL.prompts + RANDOM_HARMLESS.prompts).exp()
    ordered = (p[::2].mean(0) / p[1::2].mean(0)).argsort(descending=True)
    openers = tuple(ordered[p.mean(0)[ordered].cumsum(0) < 0.5].tolist())

    def positive(name: str) -> int:
        mass = log_probabilities(model, samples[name]).exp()[:, list(openers)].sum(-1)
        return int((mass > 0.5).sum())

    harmful = {name: positive(name) for name in ("train_harmful", "validation_harmful")}
    harmless = {
        name: len(samples[name]) - positive(name) for name in ("train_harmless", "validation_harmless")
    }
    assert all(count >= 2 for count in (harmful | harmless).values())
    assert sum(harmful.values()) < 10 and sum(harmless.values()) < 10, "the filter should leave some out"
    found = find_refusal_direction(
        model,
        Chat(chatml_tokenizer()),
        RANDOM_HARMFUL,
        RANDOM_HARMLESS,
        unfiltered(filter_prompts=True, refusal_token_ids=openers, max_kl=9.0, min_induction=-9.0),
    )
    assert found.filtered == harmful | harmless


def test_refused_and_answered_harmful_prompts_can_be_contrasted() -> None:
    settings = DirectionSettings(
        train_harmful=14, validation_harmful=6, train_harmless=10, validation_harmless=6, contrast="answered"
    )
    model, asked = planted_model(), planted_chat()
    found = find_refusal_direction(model, asked, PLANTED_HARMFUL, PLANTED_HARMLESS, settings)
    streams: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for prompt in sampled_prompts(PLANTED_HARMFUL, PLANTED_HARMLESS, settings)["train_harmful"]:
        with torch.no_grad():
            out = model(torch.tensor(asked.encode([prompt])), output_hidden_states=True)
        refuses = out.logits[0, -1].double().softmax(-1)[list(found.openers.ids)].sum().item() > 0.5
        streams[refuses].append(out.hidden_states[found.layer][0, found.position].double())
    refused, answered = (torch.stack(streams[refuses]).mean(0) for refuses in (True, False))
    torch.testing.assert_close(found.vector.double(), refused - answered, atol=1e-5, rtol=1e-5)
    assert found.filtered["train_answered"] == len(streams[False]) >= 4
    assert found.filtered["train_harmful"] == len(streams[True])
    # Induction is of the validation prompts that the model answers.
    validation = sampled_prompts(PLANTED_HARMFUL, PLANTED_HARMLESS, settings)["validation_harmful"]
    reader = NextTokenReader(model, asked, 8)
    with torch.no_grad():
        scores = refusal_scores(reader, validation, found.openers.ids)
        flipped = [prompt for prompt, score in zip(validation, scores, strict=True) if score < 0]
        assert found.filtered["validation_answered"] == len(flipped) >= 2
        with Steering(found.vector, found.layer).applied(model):
            expected = refusal_scores(reader, flipped, found.openers.ids).mean().item()
    (selected,) = (score for score in found.candidates if score.verdict == "selected")
    assert selected.induction == pytest.approx(expected, abs=1e-4)


def test_it_can_be_added_at_post_instruction_tokens_alone(planted: RefusalDirection) -> None:
    sizes = {"train_harmful": 14, "validation_harmful": 6, "train_harmless": 10, "validation_harmless": 6}
    model, asked = planted_model(), planted_chat()
    settings = DirectionSettings(**sizes, positions="post_instruction")
    found = find_refusal_direction(model, asked, PLANTED_HARMFUL, PLANTED_HARMLESS, settings)
    assert found.at == found.steering.at == asked.post_instruction_ids
    (selected,) = (score for score in found.candidates if score.verdict == "selected")
    reader = NextTokenReader(model, asked, 8)
    with torch.no_grad(), Steering(found.vector, found.layer, at=found.at).applied(model):
        expected = refusal_scores(reader, found.validation_harmless, found.openers.ids).mean().item()
    assert selected.induction == pytest.approx(expected, abs=1e-4)
    assert found.flip_rate == 1.0
    assert planted.at == ()


def test_too_few_answered_prompts_to_contrast_with() -> None:
    settings = DirectionSettings(
        train_harmful=10, validation_harmful=2, train_harmless=10, validation_harmless=6, contrast="answered"
    )
    with pytest.raises(SafeSteerError, match=r"harmful prompts are answered, and at least 4 are needed"):
        find_refusal_direction(
            planted_model(), planted_chat(), PromptSet(REFUSED, "harmful.txt"), PLANTED_HARMLESS, settings
        )


def test_bfloat16_and_peft_models() -> None:
    """An idle adapter changes nothing; bfloat16 changes the scores by no more than its precision."""
    model = architecture("qwen3")
    arguments = (Chat(chatml_tokenizer()), RANDOM_HARMFUL, RANDOM_HARMLESS)
    settings = unfiltered(refusal_token_ids=(50, 51), max_kl=9.0, min_induction=-30.0)
    expected = find_refusal_direction(model, *arguments, settings)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.train()
    found = find_refusal_direction(adapted, *arguments, settings)
    assert adapted.training
    torch.testing.assert_close(found.vector, expected.vector)
    assert (found.layer, found.position, found.fingerprint) == (
        expected.layer,
        expected.position,
        expected.fingerprint,
    )
    narrow = find_refusal_direction(architecture("qwen3").to(torch.bfloat16), *arguments, settings)
    assert narrow.vector.dtype == torch.float32
    wide_scores = {(score.layer, score.position): score.induction for score in expected.candidates}
    for score in narrow.candidates:
        if not math.isnan(score.induction):
            assert score.induction == pytest.approx(wide_scores[score.layer, score.position], abs=0.1)


def test_relaxing_is_recorded_and_never_silent(tmp_path: Path) -> None:
    """Averaged with answered prompts, the direction induces no refusal at c = 1."""
    harmful = PromptSet(REFUSED[:6] + ANSWERED, "harmful.txt")
    settings = DirectionSettings(
        filter_prompts=False, coefficient=1.0, batch_size=64, refusal_token_ids=(43, 332)
    )
    arguments = (planted_model(), planted_chat(), harmful, PLANTED_HARMLESS)
    found = find_refusal_direction(*arguments, settings)
    assert found.relaxed is not None and "90% of the best one's rise" in found.relaxed
    found.save(tmp_path)
    assert RefusalDirection.load(tmp_path).relaxed == found.relaxed
    with pytest.raises(SafeSteerError, match="fail only induction ≥ 0.*allow --fallback relax"):
        find_refusal_direction(*arguments, dataclasses.replace(settings, fallback="error"))


def test_a_model_that_refuses_too_few_harmful_prompts() -> None:
    harmful = PromptSet(REFUSED[:3] + ANSWERED, "harmful.txt")
    settings = DirectionSettings(refusal_token_ids=(43, 332), batch_size=64)
    with pytest.raises(SafeSteerError) as error:
        find_refusal_direction(planted_model(), planted_chat(), harmful, PLANTED_HARMLESS, settings)
    assert str(error.value).startswith("3 of 11 harmful prompts passed the filter (refusal score > 0")
    assert "'I', 'Sorry'" in str(error.value) and "give harmful prompts that it refuses" in str(error.value)


def test_a_model_that_refuses_harmless_prompts_too() -> None:
    harmless = PromptSet(tuple(prompt.replace("rob", "rob and rob") for prompt in REFUSED), "harmless.txt")
    settings = DirectionSettings(refusal_token_ids=(43, 332), batch_size=64)
    with pytest.raises(
        SafeSteerError, match=r"^0 of 12 harmless prompts passed .* give harmless prompts that it answers"
    ):
        find_refusal_direction(planted_model(), planted_chat(), PromptSet(REFUSED, "h"), harmless, settings)


def test_small_sets_are_divided_in_proportion() -> None:
    settings = DirectionSettings()
    samples = sampled_prompts(
        PromptSet(tuple(f"harmful {number}" for number in range(40)), "a"),
        PromptSet(tuple(f"harmless {number}" for number in range(200)), "b"),
        settings,
    )
    assert {name: len(prompts) for name, prompts in samples.items()} == {
        "train_harmful": 32,
        "validation_harmful": 8,
        "train_harmless": 128,
        "validation_harmless": 32,
    }
    assert len({prompt for prompts in samples.values() for prompt in prompts}) == 200
    eight = PromptSet(tuple("abcdefgh"), "eight.txt")
    assert [len(prompts) for prompts in sampled_prompts(eight, eight, settings).values()] == [6, 2, 6, 2]
    seven = PromptSet(tuple("abcdefg"), "seven.txt")
    with pytest.raises(SafeSteerError, match=r"seven.txt: has 7 harmless prompts.*at least 8, better 160"):
        sampled_prompts(eight, seven, settings)


def test_eight_prompts_a_side_are_enough() -> None:
    """Four refused prompts may all fall into one part; they are divided anew, two for each."""
    harmful = PromptSet(REFUSED[:4] + ANSWERED[:4], "harmful.txt")
    harmless = PromptSet(HARMLESS[:8], "harmless.txt")
    for seed in range(4):
        settings = DirectionSettings(refusal_token_ids=(43, 332), coefficient=1.0, batch_size=64, seed=seed)
        found = find_refusal_direction(planted_model(), planted_chat(), harmful, harmless, settings)
        assert found.filtered["train_harmful"] + found.filtered["validation_harmful"] == 4
        assert min(found.filtered.values()) >= 2
        assert found.vector[REFUSE] > 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_harmful": 0}, "direction.train_harmful is 0"),
        ({"batch_size": 0}, "direction.batch_size is 0"),
        (
            {"prune_layers_above": 1.5},
            "direction.prune_layers_above is 1.5; give a share above 0 and up to 1",
        ),
        ({"target_flip_rate": -0.1}, "direction.target_flip_rate is -0.1"),
        ({"coefficient": 0.0}, "direction.coefficient is 0.0; give a number above 0"),
        ({"coefficients": ()}, "direction.coefficients is"),
        ({"coefficients": (1.0, math.nan)}, "direction.coefficients is"),
        ({"contrast": "others"}, "direction.contrast is 'others'; give harmless or answered"),
        ({"contrast": "answered", "filter_prompts": False}, "direction.filter_prompts is False; give true"),
        ({"fallback": "guess"}, "direction.fallback is 'guess'; give error or relax"),
    ],
)
def test_settings_out_of_range(changes: dict, said: str) -> None:
    with pytest.raises(SafeSteerError) as error:
        DirectionSettings(**changes)
    assert str(error.value).startswith(said)


def test_every_setting_is_documented() -> None:
    assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(DirectionSettings))


def test_pruning_every_layer_away() -> None:
    with pytest.raises(SafeSteerError, match="prune_layers_above 0.2 leaves none of the model's 4 layers"):
        find_refusal_direction(
            planted_model(),
            planted_chat(),
            PLANTED_HARMFUL,
            PLANTED_HARMLESS,
            DirectionSettings(prune_layers_above=0.2, refusal_token_ids=(43, 332), batch_size=64),
        )


def test_the_fingerprint_covers_what_the_search_depends_on() -> None:
    base = {
        "model": "m",
        "chat": planted_chat(),
        "harmful": PLANTED_HARMFUL,
        "harmless": PLANTED_HARMLESS,
        "settings": DirectionSettings(),
    }
    changes = {
        "model": "n",
        "chat": dataclasses.replace(planted_chat(), system_prompt="Be brief."),
        "harmful": PromptSet(REFUSED, "harmful.txt"),
        "harmless": PLANTED_HARMFUL,
        "settings": DirectionSettings(max_kl=0.2),
    }
    prints = {direction_fingerprint(**{**base, name: value}) for name, value in changes.items()}
    prints.add(direction_fingerprint(**base))
    assert len(prints) == 6
    assert direction_fingerprint(**{**base, "harmful": PromptSet(REFUSED + ANSWERED, "moved.txt")}) in prints
