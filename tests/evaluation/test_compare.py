import csv
import io
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from safesteer.cli.compare import app
from safesteer.errors import SafeSteerError
from safesteer.evaluation.compare import compare, pareto_front
from safesteer.evaluation.compared_summaries import Figure, read_summary
from safesteer.evaluation.records import Record, Verdict
from safesteer.evaluation.statistics import wilson_interval
from safesteer.evaluation.summary import EvaluationSummary, summarize

BENCHMARKS = {
    "advbench": "harmful",
    "harmbench": "harmful",
    "advbench+prefill10": "harmful",
    "xstest-safe": "harmless",
}


def evaluation(folder, models, *, judges=("refusal-phrases",), n=20, capability=None, tax=None, **settings):
    """Write what an evaluation leaves, through the code that writes it: model → benchmark → failures out of n."""
    judged = {}
    for model, failures in models.items():
        judged[model] = {}
        for benchmark, failed in failures.items():
            kind = BENCHMARKS[benchmark]
            records = [Record(benchmark, str(i), "Hi", kind, None, "", "x", "x", 1, 0) for i in range(n)]
            verdicts = {}
            for judge in judges:
                verdicts[judge] = {
                    str(i): Verdict(
                        judge,
                        str(i),
                        "unsafe" if kind == "harmful" and i < failed else "safe",
                        (i < failed) == (kind == "harmless"),
                        "",
                    )
                    for i in range(n)
                }
            judged[model][benchmark] = (records, verdicts)
    summary = summarize(judged, settings={"seed": 0, "limit": n, **settings})
    summary = EvaluationSummary(
        **{**vars(summary), "capability": capability or {}, "tax": tax or {}},
    )
    summary.write(folder)
    return folder


def score(value, half=0.02):
    return {
        "task": "t",
        "value": value,
        "stderr": half / 2,
        "low": value - half,
        "high": value + half,
        "n": 99,
    }


TAX = {
    "kl_per_token": 0.05,
    "kl_low": 0.04,
    "kl_high": 0.06,
    "top1_agreement": 0.9,
    "top1_low": 0.88,
    "top1_high": 0.92,
    "perplexity_base": 3.0,
}


@pytest.fixture
def two_runs(tmp_path):
    base = {"advbench": 16, "harmbench": 12, "advbench+prefill10": 18, "xstest-safe": 1}
    tasks = {"gsm8k": score(0.5), "mmlu_stem": score(0.7)}
    first = evaluation(
        tmp_path / "mild" / "evaluation",
        {
            "base": base,
            "teacher": {"advbench": 1, "harmbench": 1, "advbench+prefill10": 5, "xstest-safe": 9},
            "aligned": {"advbench": 4, "harmbench": 2, "advbench+prefill10": 9, "xstest-safe": 2},
        },
        capability={
            "base": tasks,
            "teacher": {"gsm8k": score(0.3), "mmlu_stem": score(0.6)},
            "aligned": {"gsm8k": score(0.5), "mmlu_stem": score(0.69)},
        },
        tax={"aligned": TAX},
    )
    second = evaluation(
        tmp_path / "strong" / "evaluation",
        {"base": base, "aligned": {"advbench": 4, "harmbench": 2, "advbench+prefill10": 4, "xstest-safe": 3}},
        capability={
            "base": tasks,
            "aligned": {"gsm8k": score(0.48), "mmlu_stem": score(0.66), "humaneval": score(0.1)},
        },
        tax={"aligned": {**TAX, "kl_per_token": 0.2}},
    )
    return first, second


def by_name(comparison):
    return {model.name: model for model in comparison.models}


def test_means_intervals_and_front(two_runs, tmp_path):
    comparison = compare([tmp_path / "mild", two_runs[1]])
    models = by_name(comparison)
    # The base, of which both runs measured the same, stands there once.
    assert list(models) == ["base", "mild/teacher", "mild/aligned", "strong/aligned"]
    assert comparison.harmful == ("advbench", "harmbench")
    assert comparison.attacks == ("advbench+prefill10",)
    assert comparison.harmless == ("xstest-safe",)
    assert comparison.tasks == ("gsm8k", "mmlu_stem")

    aligned = models["mild/aligned"]
    assert aligned.attack_success.value == pytest.approx(100 * (4 + 2) / 40)
    widths = [wilson_interval(k, 20).high - wilson_interval(k, 20).low for k in (4, 2)]
    half = 100 * math.hypot(*widths) / 4
    assert aligned.attack_success.low == pytest.approx(15 - half)
    assert aligned.attack_success.high == pytest.approx(15 + half)
    assert aligned.under_attack.value == pytest.approx(45)
    assert aligned.over_refusal == Figure(10.0, *(100 * bound for bound in wilson_interval(2, 20)))
    assert aligned.capability.value == pytest.approx(59.5)
    assert aligned.capability.high - aligned.capability.value == pytest.approx(math.hypot(2, 2) / 2)
    assert (aligned.kl.value, aligned.kl.low, aligned.kl.high) == (0.05, 0.04, 0.06)
    assert aligned.top1_agreement.value == pytest.approx(90)
    assert models["base"].kl == Figure(0.0) and models["base"].top1_agreement == Figure(100.0)
    assert models["mild/teacher"].kl is None

    # (attack success, capability): base (70, 60), teacher (5, 45), mild (15, 59.5), strong (15, 57).
    assert comparison.axis == "capability"
    assert {name: model.on_front for name, model in models.items()} == {
        "base": True,
        "mild/teacher": True,
        "mild/aligned": True,
        "strong/aligned": False,
    }
    assert comparison.notes == ("Not known of every model and left out of the means: tasks humaneval.",)


def test_a_base_that_differs_is_shown_twice(tmp_path):
    runs = [
        evaluation(
            tmp_path / name,
            {"base": {"advbench": k, "xstest-safe": 0}, "aligned": {"advbench": 0, "xstest-safe": 1}},
        )
        for name, k in (("a", 9), ("b", 10))
    ]
    comparison = compare(runs)
    assert list(by_name(comparison)) == ["a/base", "a/aligned", "b/base", "b/aligned"]
    # Without capability, the front is that of attack success and over-refusal.
    assert comparison.axis == "over_refusal"
    assert by_name(comparison)["a/base"].on_front is True
    assert by_name(comparison)["b/base"].on_front is False
    assert by_name(comparison)["a/aligned"].on_front is True


def test_labels(tmp_path):
    one = evaluation(tmp_path / "x" / "run", {"base": {"advbench": 1}})
    other = evaluation(tmp_path / "y" / "run", {"base": {"advbench": 2}})
    assert list(by_name(compare([one]))) == ["base"]
    assert list(by_name(compare([one, other]))) == ["run-1/base", "run-2/base"]
    assert list(by_name(compare([f"mine={one}", f"yours={other / 'summary.json'}"]))) == [
        "mine/base",
        "yours/base",
    ]


def test_only_what_all_were_asked_counts(tmp_path):
    runs = [
        evaluation(tmp_path / "a", {"base": {"advbench": 10, "harmbench": 20}}),
        evaluation(tmp_path / "b", {"base": {"advbench": 12}}, limit=5),
    ]
    comparison = compare(runs)
    assert comparison.harmful == ("advbench",)
    assert [model.attack_success.value for model in comparison.models] == [50, 60]
    assert comparison.axis is None and comparison.models[0].on_front is None
    assert any("benchmarks harmbench" in note for note in comparison.notes)
    assert any("differ in limit (20 in a, 5 in b)" in note for note in comparison.notes)


def test_the_judge(tmp_path):
    a = evaluation(tmp_path / "a", {"base": {"advbench": 1}}, judges=("refusal-phrases", "wildguard"))
    b = evaluation(
        tmp_path / "b", {"base": {"advbench": 2}}, judges=("gcg-phrases", "wildguard", "refusal-phrases")
    )
    c = evaluation(tmp_path / "c", {"base": {"advbench": 2}}, judges=("gcg-phrases",))
    assert compare([a, b]).judge == "wildguard"
    assert compare([a, b], judge="refusal-phrases").judge == "refusal-phrases"
    assert compare([c]).judge == "gcg-phrases"
    with pytest.raises(
        SafeSteerError, match="'gcg-phrases': was not used by every evaluation; choose one of"
    ):
        compare([a, b], judge="gcg-phrases")
    with pytest.raises(SafeSteerError, match="no judge in common"):
        compare([a, c])


def test_unparsed_verdicts_are_told(tmp_path):
    folder = evaluation(tmp_path / "a", {"base": {"advbench": 1}})
    values = json.loads((folder / "summary.json").read_text())
    values["rates"][0]["rates"]["unparsed"] = 3
    (folder / "summary.json").write_text(json.dumps(values))
    assert compare([folder]).notes == ("Verdicts that could not be read, counted neither way: 3 of base.",)


def test_files(two_runs, tmp_path):
    comparison = compare(two_runs)
    files = comparison.write(tmp_path / "out", plot=False)
    assert [file.name for file in files] == ["compare.json", "compare.csv", "compare.md"]
    values = json.loads(files[0].read_text())
    assert values["models"][2]["attack_success"]["value"] == pytest.approx(15)
    rows = list(csv.DictReader(io.StringIO(files[1].read_text())))
    found = {(row["model"], row["measure"], row["name"]): row for row in rows}
    assert float(found["strong/aligned", "task", "humaneval"]["value"]) == pytest.approx(10)
    assert float(found["mild/aligned", "benchmark", "advbench"]["value"]) == pytest.approx(20)
    assert found["base", "kl", ""]["low"] == "" and found["base", "kl", ""]["on_front"] == "yes"
    text = files[2].read_text()
    assert "| mild/aligned | 15.0 (" in text
    assert "0.050 (0.040–0.060)" in text
    assert "attack success % ↓" in text and "capability % ↑" in text
    # Every row of a table has as many cells as its head.
    for table in text.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_plot(two_runs, tmp_path):
    pytest.importorskip("matplotlib")
    files = compare(two_runs).write(tmp_path / "out")
    png, svg = files[-2:]
    assert png.read_bytes().startswith(b"\x89PNG\r\n") and png.stat().st_size > 5_000
    drawing = svg.read_text()
    # Text is drawn as shapes, with the text itself in a comment.
    for name in ("base", "mild/teacher", "mild/aligned", "strong/aligned"):
        assert f"<!-- {name} -->" in drawing
    before = svg.read_bytes()
    compare(two_runs).write(tmp_path / "again")
    assert (tmp_path / "again" / "compare.svg").read_bytes() == before


def test_without_matplotlib_the_tables_are_still_written(two_runs, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a)
    )
    with pytest.raises(SafeSteerError, match=r"pip install 'safesteer\[report\]'"):
        compare(two_runs).write(tmp_path / "out")
    assert (tmp_path / "out" / "compare.csv").is_file()


def dominated(point, points):
    return any(all(o <= p for o, p in zip(other, point, strict=True)) and other != point for other in points)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_front_is_what_nothing_dominates(points):
    front = pareto_front(points)
    assert front == [not dominated(point, points) for point in points]
    assert any(front) == bool(points)
    # No two on it are ordered, and everything off it is dominated by something on it.
    on = [point for point, is_on in zip(points, front, strict=True) if is_on]
    assert not any(dominated(a, [b]) for a, b in itertools.permutations(on, 2))
    assert all(dominated(point, on) for point, is_on in zip(points, front, strict=True) if not is_on)


def summary_values(tmp_path):
    folder = evaluation(
        tmp_path / "whole",
        {"base": {"advbench": 1, "xstest-safe": 1}},
        capability={"base": {"gsm8k": score(0.5)}},
        tax={"aligned": TAX},
    )
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\x00",
        b"null",
        b'{"subjects": 3, "rates": []}',
        b"[" * 100_000,
        b'{"a":' * 9_000,
    ]
    + [
        b'{"subjects": ["base"], "rates": [1]}',
        b'{"subjects": [1], "rates": []}',
        b'{"subjects": [], "rates": {}}',
    ],
)
def test_broken_files_are_one_sentence(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(SafeSteerError) as caught:
        compare([tmp_path])
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


JUNK = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})
)


@given(data=st.data())
def test_damaged_summaries_are_read_or_refused_in_one_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    values = summary_values(folder)
    place = values
    # Walk to some place in the tree and put something else there, or take it away.
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        if data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(JUNK)
        break
    file = folder / "summary.json"
    file.write_text(json.dumps(values))
    try:
        compare([file]).markdown()
    except SafeSteerError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("run", ["nothing", "a=nothing", "", "x" * 5000, "\x00", "=", "a="])
def test_no_evaluation_there(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SafeSteerError, match="holds no summary.json of an evaluation"):
        read_summary(run)


def test_command(two_runs, tmp_path):
    runner = CliRunner(env={"COLUMNS": "200"})
    result = runner.invoke(
        app, [str(tmp_path / "mild"), str(tmp_path / "strong"), "--output", str(tmp_path / "o"), "--no-plot"]
    )
    assert result.exit_code == 0, result.output
    for shown in (
        "mild/teacher",
        "15.0 (",
        "0.050",
        "mean over advbench, harmbench",
        "humaneval",
        "compare.json",
    ):
        assert shown in result.output
    assert (tmp_path / "o" / "compare.md").is_file()
    wrong = runner.invoke(app, [str(tmp_path / "nowhere")])
    assert wrong.exit_code == 2
    assert "holds no summary.json" in wrong.output and "Traceback" not in wrong.output


def test_a_demo_can_be_compared_as_its_run(tmp_path):
    evaluation(tmp_path / "one" / "demo", {"base": {"advbench": 9}, "aligned": {"advbench": 2}})
    evaluation(tmp_path / "two" / "demo", {"base": {"advbench": 9}, "aligned": {"advbench": 1}})
    found = by_name(compare([tmp_path / "one", tmp_path / "two"]))
    assert list(found) == ["base", "one/aligned", "two/aligned"]
    # What `safesteer evaluate` wrote goes first.
    evaluation(tmp_path / "two" / "evaluation", {"base": {"advbench": 9}, "aligned": {"advbench": 5}})
    assert by_name(compare([tmp_path / "two"]))["aligned"].attack_success.value == 25
