"""AlpacaEval 2: win rates against closed cases and an independent optimiser, judging through a real HTTP server."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.alpaca_server import FakeServer, judge_at, references, served
from evaluation.capability_cases import bundled_subject
from safesteer.errors import SafeSteerError
from safesteer.evaluation.alpaca_eval import alpaca_eval, load_difficulty, load_judge_prompt, load_references
from safesteer.evaluation.pairwise_judge import (
    Comparison,
    Reference,
    preference_for_second,
)
from safesteer.evaluation.win_rates import fit_preferences, length_controlled_change, win_rates


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with served() as made:
        yield made


def comparison(number: int, preference: float | None, length: int, reference_length: int = 100) -> Comparison:
    return Comparison(str(number), "i", "x" * length, reference_length, preference, "")


def test_the_judge_sees_each_order_and_its_probabilities_are_turned_back(server: FakeServer) -> None:
    judge = judge_at(server)
    shown = set()
    for n in range(12):
        reference = Reference(f"Question {n}", "a short one")
        made = judge.compare(str(n), reference, "a much longer answer than the reference's", 0)
        assert made.preference == pytest.approx(0.75)  # 0.6 / (0.6 + 0.2), whichever order it was shown in
        text = server.requests[-1]["messages"][0]["content"]
        shown.add(text.index("a short one") < text.index("a much longer"))
    assert shown == {True, False}
    assert server.requests[0]["max_tokens"] == 1
    assert server.requests[0]["top_logprobs"] == 5


def test_without_probabilities_the_letter_alone_counts(server: FakeServer) -> None:
    server.logprobs = False
    longer, shorter = "a much longer answer than that", "x"
    for output, expected in ((longer, 1.0), (shorter, 0.0)):
        reference = Reference("Question", "a middling one")
        assert judge_at(server).compare("0", reference, output, 0).preference == expected
    server.says = "Model m is better."
    assert judge_at(server).compare("0", Reference("Question", "a"), "bb", 0).preference is None


def test_answers_cannot_speak_for_the_judge() -> None:
    assert preference_for_second("M", {}) == 1.0
    assert preference_for_second(" m\n", {}) == 0.0
    for text in ("", "mM", "m M", "M is better", "verdict: M", "Mm", "µ"):
        assert preference_for_second(text, {}) is None
    assert preference_for_second("?", {"m": math.log(0.1), "x": math.log(0.8)}) == 0.0
    assert preference_for_second("M", {"the": -0.1}) == 1.0


def test_an_answer_that_names_a_place_in_the_prompt_stays_as_it_is(server: FakeServer) -> None:
    judge_at(server).compare("0", Reference("Do {output_2}", "{instruction}"), "{output_1}", 0)
    text = server.requests[0]["messages"][0]["content"]
    assert all(text.count(word) == 1 for word in ("Do {output_2}", "{instruction}", "{output_1}"))


def test_a_prompt_of_turns_is_understood(server: FakeServer) -> None:
    prompt = (
        "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n<<<\n{instruction}\n>>> <<<\n{output_1}\n>>> "
        "<<<\n{output_2}\n>>><|im_end|>\n"
    )
    judge_at(server, prompt).compare("0", Reference("Q", "aa"), "b", 0)
    assert [message["role"] for message in server.requests[0]["messages"]] == ["system", "user"]
    with pytest.raises(SafeSteerError, match="output_2"):
        judge_at(server, "{instruction} {output_1}")


def test_the_whole_path_resumes_and_asks_nothing_twice(server: FakeServer, tmp_path: Path) -> None:
    references(tmp_path)
    subject = bundled_subject()
    options: dict[str, Any] = {"data_dir": tmp_path, "max_new_tokens": 8, "batch_size": 2}
    score = alpaca_eval(subject, judge_at(server), tmp_path / "out", **options)
    # The fake judge gives the longer one 0.75: the model wins against "x" and loses against the long ones.
    assert score.win_rate == pytest.approx(100 * (2 * 0.75 + 3 * 0.25) / 5)
    assert (score.n, score.unparsed, len(server.requests)) == (5, 0, 5)
    path = tmp_path / "out" / "comparisons.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:10])  # killed while it wrote the third
    assert alpaca_eval(subject, judge_at(server), tmp_path / "out", **options) == score
    assert len(server.requests) == 8
    with pytest.raises(SafeSteerError, match="choose another --output"):
        alpaca_eval(
            dataclasses.replace(subject, identity="other"), judge_at(server), tmp_path / "out", **options
        )


def test_a_judge_that_says_nothing_readable_is_told(server: FakeServer, tmp_path: Path) -> None:
    references(tmp_path, 2)
    server.logprobs, server.says = False, "Both are fine."
    with pytest.raises(SafeSteerError, match="answered none of 2 comparisons"):
        alpaca_eval(
            bundled_subject(), judge_at(server), tmp_path / "out", data_dir=tmp_path, max_new_tokens=2
        )


def test_without_a_length_effect_the_two_rates_agree() -> None:
    lengths = [50, 150] * 40
    preferences = [0.9, 0.9, 0.3, 0.3] * 20  # independent of the length
    score = win_rates(
        [comparison(n, p, k) for n, (p, k) in enumerate(zip(preferences, lengths, strict=True))]
    )
    assert score.win_rate == pytest.approx(60)
    assert score.length_controlled == pytest.approx(60, abs=0.01)
    assert score.length_effect == pytest.approx(0, abs=1e-3)
    assert score.win_rate_low < 60 < score.win_rate_high


def test_a_preference_for_length_alone_is_taken_out() -> None:
    # Of 100 answers 80 are longer than the reference's, which alone decides: log-odds ±1 with the sign.
    deltas = np.array([40] * 80 + [-40] * 20, dtype=float)
    x = np.tanh(deltas / deltas.std(ddof=1))
    preferences = 1 / (1 + np.exp(-1.0 * x))
    score = win_rates(
        [
            comparison(n, float(p), int(100 + d))
            for n, (p, d) in enumerate(zip(preferences, deltas, strict=True))
        ]
    )
    assert score.win_rate > 60
    assert score.length_controlled == pytest.approx(50, abs=0.1)
    assert score.length_effect == pytest.approx(1, abs=0.01)


def test_difficulty_is_part_of_the_fit() -> None:
    rng = np.random.default_rng(0)
    gamma, deltas = rng.normal(size=300), rng.normal(scale=50, size=300).round()
    logits = 0.4 - 0.8 * np.tanh(deltas / deltas.std(ddof=1)) + 1.5 * gamma
    rows = [
        comparison(n, float(1 / (1 + math.exp(-z))), int(500 + d), 500)
        for n, (z, d) in enumerate(zip(logits, deltas, strict=True))
    ]
    score = win_rates(rows, gamma)
    assert score.length_effect == pytest.approx(-0.8, abs=0.01)
    assert score.length_controlled == pytest.approx(
        100 * float(np.mean(1 / (1 + np.exp(-(0.4 + 1.5 * gamma))))), abs=0.05
    )
    assert "noreg" in score.notes


def test_the_fit_equals_an_independent_one() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    features = np.stack([np.ones(60), rng.uniform(-1, 1, 60), rng.normal(size=60)], axis=1)
    p = rng.uniform(0, 1, 60)
    # Soft labels as every row twice, once for each outcome, weighted by its probability.
    model = linear_model.LogisticRegression(C=100, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit(
        np.concatenate([features, features]),
        np.concatenate([np.ones(60), np.zeros(60)]),
        sample_weight=np.concatenate([p, 1 - p]),
    )
    np.testing.assert_allclose(fit_preferences(features, p), model.coef_[0], atol=1e-5)


def test_separable_preferences_have_a_finite_fit() -> None:
    score = win_rates([comparison(n, 1.0, 120 + n) for n in range(30)])
    assert score.win_rate == 100
    assert 95 < score.length_controlled <= 100
    assert math.isfinite(score.length_effect)


def test_unread_verdicts_count_in_no_rate() -> None:
    rows = [comparison(0, 1.0, 90), comparison(1, None, 10_000), comparison(2, 0.0, 110)]
    score = win_rates(rows)
    assert (score.win_rate, score.n, score.unparsed) == (50.0, 2, 1)
    assert score.mean_length == 100


def drawn(shift: float) -> list[Comparison]:
    """Preferences that are the same for every shift but for that shift of the log-odds."""
    rng = np.random.default_rng(2)
    base, deltas = rng.normal(size=120), rng.normal(scale=40, size=120).round()
    return [
        comparison(n, float(1 / (1 + math.exp(-(z + shift)))), int(300 + d), 300)
        for n, (z, d) in enumerate(zip(base, deltas, strict=True))
    ]


def test_a_change_is_the_difference_of_the_rates_over_the_same_instructions() -> None:
    before, after = drawn(0.0), drawn(-0.5)
    change = length_controlled_change(before, after)
    rates = [win_rates(found) for found in (before, after)]
    assert change.estimate == pytest.approx(rates[1].length_controlled - rates[0].length_controlled, abs=1e-6)
    assert change.n == 120 and change.low < change.estimate < change.high < 0
    # Paired: the instructions' own spread, which both share, is not in it.
    spread = [rate.length_controlled_high - rate.length_controlled_low for rate in rates]
    assert change.high - change.low < 0.5 * math.hypot(*spread)
    mirrored = length_controlled_change(after, before)
    assert (mirrored.low, mirrored.high) == pytest.approx((-change.high, -change.low), abs=1e-6)


def test_no_change_in_few_instructions_is_no_certainty() -> None:
    found = [comparison(0, 0.75, 90), comparison(1, 0.25, 110), comparison(2, None, 100)]
    change = length_controlled_change(found, found)
    assert (change.estimate, change.n) == (0.0, 2)
    assert change.high == pytest.approx(100 * (1 - 0.025**0.5)) and change.low == -change.high
    assert length_controlled_change(found[2:], found).n == 0


def test_the_published_reference_answers_load(shared_data: Path) -> None:
    found = load_references(shared_data / "alpaca_eval")
    assert len(found) == 805
    assert found[0].instruction.startswith("What are the names of some famous actors")


def test_files_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "alpaca_eval"
    with pytest.raises(SafeSteerError, match="no such file"):
        load_references(folder)
    references(tmp_path, 2)
    path = folder / "gpt4_1106_preview_model_outputs.json"
    assert len(load_references(folder)) == 2
    path.write_text('[{"instruction": "a"}]')
    with pytest.raises(SafeSteerError, match="entry 1: needs the fields"):
        load_references(folder)
    table = folder / "instruction_difficulty.csv"
    assert load_difficulty(folder, 2) is None
    table.write_text("index,instruction_difficulty\n0,0.5\n1,-1.25\n")
    assert load_difficulty(folder, 2).tolist() == [0.5, -1.25]  # type: ignore[union-attr]
    for text, words in (
        ("index,x\n0,0.5\n", "no number for instruction 1"),
        ("index,x\n0,a\n1,2\n", "not a table"),
        ("index,x\n0,1\n7,2\n", "not a table"),
    ):
        table.write_text(text)
        with pytest.raises(SafeSteerError, match=words):
            load_difficulty(folder, 2)
    assert load_judge_prompt(tmp_path) is None
    (folder / "alpaca_eval_clf.txt").write_text("{instruction}{output_1}{output_2}")
    assert load_judge_prompt(tmp_path) == "{instruction}{output_1}{output_2}"
