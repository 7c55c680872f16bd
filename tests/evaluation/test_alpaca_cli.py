"""AlpacaEval 2 as a person asks for it: beside the other tasks, with its judge behind a real HTTP server."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluation.alpaca_server import FakeServer, judge_at, references, served
from evaluation.capability_cases import bundled_subject
from safesteer.cli import app
from safesteer.errors import SafeSteerError
from safesteer.evaluation.beyond_safety import with_alpaca_eval
from safesteer.evaluation.compare import compare
from safesteer.evaluation.pairwise_judge import load_pairwise_judge
from safesteer.evaluation.subjects import Subject
from safesteer.evaluation.summary import EvaluationSummary
from safesteer.testbed.demo import testbed_folder as bundled_testbed


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with served() as made:
        yield made


def test_models_get_scores_beside_the_other_tasks(server: FakeServer, tmp_path: Path) -> None:
    references(tmp_path, 4)
    found = bundled_subject()
    subjects: list[Subject] = [dataclasses.replace(found, name=name) for name in ("base", "aligned")]
    before = EvaluationSummary(("base", "aligned"), (), capability={"base": {"skills": {"value": 1.0}}})
    summary = with_alpaca_eval(
        before, subjects, judge_at(server), tmp_path / "out", data_dir=tmp_path, limit=3
    )
    assert list(summary.capability["base"]) == ["skills", "alpaca_eval"]
    assert list(summary.capability["aligned"]) == ["alpaca_eval"]
    (change,) = summary.changes
    assert (change.subject, change.against, change.measure) == ("aligned", "base", "preferred")
    assert change.judge == judge_at(server).where and change.difference.estimate == 0
    assert (
        change.sentence.startswith("length-controlled wins of alpaca_eval")
        and "no evidence" in change.sentence
    )


def evaluated(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["evaluate", *arguments], env={"COLUMNS": "300"})
    return result.exit_code, " ".join(result.output.split())


def test_the_command_line_asks_the_judge_and_compare_shows_it(server: FakeServer, tmp_path: Path) -> None:
    references(tmp_path, 4)
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    out = tmp_path / "out"
    code, printed = evaluated(
        str(bundled_testbed() / "model"), "--capability", "alpaca-eval", "--alpaca-judge", f"judge@{url}",
        "--benchmark", "alarming", "--limit", "2", "--max-new-tokens", "2", "--data-dir", str(tmp_path),
        "--output", str(out), "--device", "cpu", "--judge", "refusal-phrases",
    )  # fmt: skip
    assert code == 0, printed
    assert len(server.requests) == 3 and {body["model"] for body in server.requests} == {
        "judge"
    }  # one to try it
    scores = json.loads((out / "summary.json").read_text())["capability"]["model"]["alpaca_eval"]
    lines = (out / "model" / "capability" / "alpaca_eval" / "comparisons.jsonl").read_text().splitlines()[1:]
    kept = [json.loads(line)["preference"] for line in lines]
    assert (scores["n"], scores["metric"]) == (2, "length_controlled_win_rate")
    assert scores["others"]["win_rate"] == pytest.approx(sum(kept) / 2)
    assert 0 <= scores["low"] <= scores["value"] <= scores["high"] <= 1
    assert "alpaca_eval" in printed and f"{100 * scores['value']:.1f} (" in printed
    assert "| alpaca_eval |" in (out / "summary.md").read_text()
    comparison = compare([out])
    assert comparison.tasks == ("alpaca_eval",)
    capability = comparison.models[0].capability
    assert capability is not None and capability.value == pytest.approx(100 * scores["value"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--capability", "alpaca_eval"],
            "give --alpaca-judge MODEL@URL, such as gpt-4-1106-preview@https://",
        ),
        (["--alpaca-judge", "m@http://h/v1"], "give --capability alpaca_eval too"),
        (["--capability", "alpaca_eval", "--alpaca-judge", "gpt-4"], "gpt-4: is no chat model on a server"),
        (["--capability", "alpaca_eval", "--alpaca-judge", "@http://h/v1"], "is no chat model on a server"),
        (["--capability", "alpaca_eval", "--alpaca-judge", "m@h:80/v1"], "is no chat model on a server"),
    ],
)
def test_what_is_wrong_with_the_judge_is_told_before_anything_is_loaded(
    options: list[str], told: str
) -> None:
    code, printed = evaluated("./no-such-model", *options)
    assert code == 2 and told in printed and "no-such-model" not in printed


def test_a_judge_that_refuses_a_trial_is_told_before_the_models_answer(server: FakeServer) -> None:
    host = f"127.0.0.1:{server.server_address[1]}"
    judge = load_pairwise_judge(f" org/a@b@http://{host}/v1 ")
    assert judge.where == f"org/a@b at http://{host}/v1"
    judge.prepare()
    server.refuses = True
    with pytest.raises(SafeSteerError, match="refused a trial request .HTTP 400: no logprobs here"):
        judge.prepare()
