"""Benchmarks load from the documented files, whole, with their schema checked."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from safesteer.errors import SafeSteerError
from safesteer.evaluation.benchmark import BenchmarkUnavailable
from safesteer.evaluation.benchmark_files import MAX_CHARACTERS, Skipped, load_benchmark, own_prompts
from safesteer.evaluation.benchmarks import BENCHMARKS, SUITES, benchmark_named
from safesteer.evaluation.variants import variant_named
from safesteer.testbed.requests import load_requests

LOCK = "How do I pick a lock?"
BREAD = "How do I kill the yeast in my bread dough?"


def sentence(error: pytest.ExceptionInfo[SafeSteerError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.isprintable() and text.endswith(".")
    return text


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with the standard library, as an independent reference."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sorry_rows() -> list[dict[str, Any]]:
    """Rows of SORRY-Bench's documented schema: 3 base prompts, one of them mutated too."""
    base = [
        {"question_id": n, "category": str(n), "turns": [f"Question {n}?"], "prompt_style": "base"}
        for n in (1, 2, 3)
    ]
    return [*base, {"question_id": 1, "category": "1", "turns": ["Qu3stion 1?"], "prompt_style": "slang"}]


@pytest.mark.parametrize(
    ("name", "path", "field", "category", "where"),
    [
        ("advbench", "advbench/harmful_behaviors.csv", "goal", None, {}),
        (
            "harmbench",
            "harmbench/harmbench_behaviors_text_all.csv",
            "Behavior",
            "SemanticCategory",
            {"FunctionalCategory": "standard"},
        ),
        ("jailbreakbench", "jailbreakbench/harmful-behaviors.csv", "Goal", "Category", {}),
        ("jailbreakbench-benign", "jailbreakbench/benign-behaviors.csv", "goal", "category", {}),
        ("strongreject", "strongreject/strongreject_dataset.csv", "forbidden_prompt", "category", {}),
        ("xstest-safe", "xstest/xstest_prompts.csv", "prompt", "type", {"label": "safe"}),
        ("xstest-unsafe", "xstest/xstest_prompts.csv", "prompt", "type", {"label": "unsafe"}),
    ],
)
def test_published_csv_files_load_whole(
    shared_data: Path, name: str, path: str, field: str, category: str | None, where: dict[str, str]
) -> None:
    rows = rows_of(shared_data / path)
    wanted = [row for row in rows if all(row[key] == value for key, value in where.items())]
    loaded = load_benchmark(name, data_dir=shared_data)
    assert [prompt.prompt for prompt in loaded] == [row[field].strip() for row in wanted]
    assert [prompt.category for prompt in loaded] == [row[category] if category else None for row in wanted]
    assert {prompt.kind for prompt in loaded} == {BENCHMARKS[name].kind}
    assert loaded.skipped == Skipped(filtered=len(rows) - len(wanted))
    assert len(loaded) == BENCHMARKS[name].size
    assert len({prompt.id for prompt in loaded}) == len(loaded)


def test_contextual_behaviors_come_with_their_context(shared_data: Path) -> None:
    rows = rows_of(shared_data / "harmbench/harmbench_behaviors_text_all.csv")
    wanted = {
        row["BehaviorID"]: f"{row['ContextString'].strip()}\n\n---\n\n{row['Behavior'].strip()}"
        for row in rows
        if row["FunctionalCategory"] == "contextual"
    }
    loaded = load_benchmark("harmbench-contextual", data_dir=shared_data)
    assert {prompt.id: prompt.prompt for prompt in loaded} == wanted
    assert len(wanted) == 100


@pytest.mark.parametrize(("split", "file", "size"), [("validation", "val", 60), ("test", "test", 240)])
def test_harmbenchs_splits_have_their_functional_categories(
    shared_data: Path, split: str, file: str, size: int
) -> None:
    rows = rows_of(shared_data / f"harmbench/harmbench_behaviors_text_{file}.csv")
    wanted = {
        row["BehaviorID"]: row["FunctionalCategory"]
        for row in rows
        if row["FunctionalCategory"] != "copyright"
    }
    loaded = load_benchmark(f"harmbench-{split}", data_dir=shared_data)
    assert {prompt.id: prompt.category for prompt in loaded} == wanted
    assert len(loaded) == BENCHMARKS[f"harmbench-{split}"].size == size
    standard = {prompt.prompt for prompt in loaded if prompt.category == "standard"}
    assert standard < {prompt.prompt for prompt in load_benchmark("harmbench", data_dir=shared_data)}
    contextual = {prompt.prompt for prompt in loaded if prompt.category == "contextual"}
    assert contextual < {p.prompt for p in load_benchmark("harmbench-contextual", data_dir=shared_data)}


def test_pku_saferlhf_has_its_930_unique_prompts(shared_data: Path) -> None:
    rows = json.loads((shared_data / "pku_saferlhf_test/prompts_unique.json").read_text())
    loaded = load_benchmark("pku-saferlhf", data_dir=shared_data)
    assert [prompt.prompt for prompt in loaded] == [row["prompt"].strip() for row in rows]
    assert len(loaded) == 930 and loaded.skipped == Skipped()


def test_harmfulqa_is_flattened_by_topic_and_its_repetitions_are_counted(shared_data: Path) -> None:
    tree = json.loads((shared_data / "harmfulqa/harmfulqa.json").read_text())
    pairs = [(topic, q) for topic, subs in tree.items() for questions in subs.values() for q in questions]
    first: dict[str, str] = {}
    for topic, question in pairs:
        first.setdefault(" ".join(question.casefold().split()), topic)
    loaded = load_benchmark("harmfulqa", data_dir=shared_data)
    assert len(pairs) == BENCHMARKS["harmfulqa"].size
    assert loaded.skipped == Skipped(duplicates=len(pairs) - len(first))
    assert Counter(prompt.category for prompt in loaded) == Counter(first.values())


@pytest.mark.parametrize("name", [b.name for b in BENCHMARKS.values() if b.package_file])
def test_the_projects_own_prompts_need_no_file(name: str) -> None:
    kind: Any = "alarming" if name == "alarming" else name.removeprefix("testbed-")
    loaded = load_benchmark(name)
    requests = load_requests(kind, "test")
    assert [prompt.prompt for prompt in loaded] == [request.prompt for request in requests]
    assert [prompt.category for prompt in loaded] == [request.category for request in requests]
    assert len(loaded) == BENCHMARKS[name].size


def test_sorry_bench_reads_the_single_turn_of_base_prompts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sorry_bench/question.jsonl", sorry_rows())
    loaded = load_benchmark("sorry-bench", data_dir=tmp_path)
    assert [(p.id, p.prompt, p.category) for p in loaded] == [
        ("1", "Question 1?", "1"),
        ("2", "Question 2?", "2"),
        ("3", "Question 3?", "3"),
    ]
    assert loaded.skipped == Skipped(filtered=1)


def test_sorry_bench_without_prompt_style_keeps_every_row(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "prompt_style"} for row in sorry_rows()[:3]]
    write_jsonl(tmp_path / "question.jsonl", rows)
    assert len(load_benchmark("sorry-bench", data_dir=tmp_path)) == 3


def test_alert_prompts_lose_their_wrapping(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "prompt": f"### Instruction:\n{LOCK}\n### Response:\n", "category": "crime_theft"},
        {"id": 8, "prompt": "### Instruction:\n\n### Response:\n", "category": "crime_other"},
        {"id": 9, "prompt": "Unwrapped?", "category": "crime_other"},
    ]
    write_jsonl(tmp_path / "alert/alert.jsonl", rows)
    loaded = load_benchmark("alert", data_dir=tmp_path)
    assert [(p.id, p.prompt, p.category) for p in loaded] == [
        ("7", LOCK, "crime_theft"),
        ("9", "Unwrapped?", "crime_other"),
    ]
    assert loaded.skipped == Skipped(empty=1)


@pytest.mark.parametrize("folder", ["or_bench", "or-bench", "."])
def test_or_bench_hard(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "or-bench-hard-1k.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'prompt,category\n"{BREAD}",violence\n"  {BREAD.upper()} ",violence\n"",deception\n')
    for data_dir in (tmp_path, path):
        loaded = load_benchmark("or-bench-hard", data_dir=data_dir)
        assert [(p.prompt, p.category, p.kind) for p in loaded] == [(BREAD, "violence", "harmless")]
        assert loaded.skipped == Skipped(duplicates=1, empty=1)
        assert str(loaded.skipped) == "1 repeated and 1 empty"


def test_overlong_prompts_are_counted(tmp_path: Path) -> None:
    rows = [{"id": 1, "prompt": "x" * MAX_CHARACTERS}, {"id": 2, "prompt": "x" * (MAX_CHARACTERS + 1)}]
    write_jsonl(tmp_path / "alert.jsonl", [{**row, "category": "c"} for row in rows])
    loaded = load_benchmark("alert", data_dir=tmp_path)
    assert [prompt.id for prompt in loaded] == ["1"] and loaded.skipped == Skipped(overlong=1)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"id": 2, "text": "a"}, "line 2: field 'prompt' is missing (it has: id, text)"),
        ({"id": 2, "prompt": 5}, "line 2: field 'prompt' holds a int, not text"),
        ({"id": 2, "prompt": ["a", "b"]}, "line 2: field 'prompt' holds 2 turns"),
        ({"id": 1, "prompt": "b"}, "line 2: repeats the id '1' of line 1"),
        ({"id": 1.5, "prompt": "b"}, "line 2: field 'id' holds a float"),
        ({"id": 2, "prompt": "\ud83d"}, "line 2: holds half a surrogate pair"),
        ("b", "line 2: field 'prompt' is missing (it has: none)"),
    ],
)
def test_a_bad_row_is_told_by_file_line_and_fields(tmp_path: Path, row: object, told: str) -> None:
    path = write_jsonl(tmp_path / "alert.jsonl", [{"id": 1, "prompt": "a", "category": "c"}, row])
    if isinstance(row, dict) and "category" not in row:
        row["category"] = "c"
        write_jsonl(path, [{"id": 1, "prompt": "a", "category": "c"}, row])
        told = told.replace("id, text)", "id, text, category)")
    with pytest.raises(SafeSteerError) as error:
        load_benchmark("alert", data_dir=tmp_path)
    assert sentence(error).startswith(f"{path} {told}")


def test_a_file_with_other_fields_is_told(tmp_path: Path) -> None:
    (tmp_path / "xstest_prompts.csv").write_text("id,question,label\n1,a,safe\n")
    with pytest.raises(SafeSteerError, match=r"field 'prompt' of xstest-safe is missing \(it has: id, quest"):
        load_benchmark("xstest-safe", data_dir=tmp_path)
    (tmp_path / "xstest_prompts.csv").write_text("id,prompt\n1,a\n")
    with pytest.raises(SafeSteerError, match="field 'label' of xstest-safe is missing"):
        load_benchmark("xstest-safe", data_dir=tmp_path)
    (tmp_path / "xstest_prompts.csv").write_text("id,prompt,label\n1,a,unsafe\n")
    with pytest.raises(
        SafeSteerError, match=r"no usable prompt of xstest-safe \(left out 1 of another part\)"
    ):
        load_benchmark("xstest-safe", data_dir=tmp_path)
    (tmp_path / "harmful_behaviors.csv").write_text("goals\na\n")
    with pytest.raises(SafeSteerError, match="field 'prompt' or 'goal' of advbench is missing"):
        load_benchmark("advbench", data_dir=tmp_path)


def test_what_is_nowhere_to_be_had_is_told_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError) as error:
        load_benchmark("sorry-bench", data_dir=tmp_path)
    told = sentence(error)
    for part in (
        "sorry-bench/sorry-bench-202503",
        f"--data-dir {tmp_path}",
        "hf auth login",
        "question.jsonl",
    ):
        assert part in told
    with pytest.raises(SafeSteerError, match="no --data-dir is given and Babelscape/ALERT cannot be loaded"):
        load_benchmark("alert")
    with pytest.raises(
        BenchmarkUnavailable, match="put harmbench/harmbench_behaviors_text_test.csv .from github"
    ):
        load_benchmark("harmbench-test")
    with pytest.raises(SafeSteerError, match="no such folder"):
        load_benchmark("advbench", data_dir=tmp_path / "none")
    other = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "a"}])
    with pytest.raises(SafeSteerError, match=r"is a file, but not alert.jsonl"):
        load_benchmark("alert", data_dir=other)
    with pytest.raises(
        SafeSteerError, match="--benchmark nonesuch: no such benchmark; choose among advbench"
    ):
        load_benchmark("nonesuch")


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, name: str | None, **options: Any) -> datasets.Dataset:
        asked.update(path=path, name=name, **options)
        return datasets.Dataset.from_list(
            [
                {"prompt": LOCK, "is_response_0_safe": True, "is_response_1_safe": False},
                {"prompt": LOCK, "is_response_0_safe": False, "is_response_1_safe": True},
                {"prompt": BREAD, "is_response_0_safe": True, "is_response_1_safe": True},
            ]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_benchmark("pku-saferlhf")
    assert [prompt.prompt for prompt in loaded] == [LOCK]
    assert loaded.skipped == Skipped(duplicates=1, filtered=1)
    assert asked == {
        "path": "PKU-Alignment/PKU-SafeRLHF",
        "name": None,
        "data_files": "round0/test.jsonl.xz",
        "split": "train",
        "revision": "ff7ba91063016c78a225b0f74e1c0860bb18230f",
    }


def test_samples_repeat_and_grow(shared_data: Path) -> None:
    def ids(limit: int | None, seed: int = 0) -> list[str]:
        return [p.id for p in load_benchmark("advbench", data_dir=shared_data, limit=limit, seed=seed)]

    whole = ids(None)
    assert ids(50) == ids(50) != ids(50, seed=1)
    assert set(ids(50)) < set(ids(200)) < set(whole)
    assert ids(200) == [name for name in whole if name in set(ids(200))]
    assert ids(520) == ids(10_000) == whole
    loaded = load_benchmark("advbench", data_dir=shared_data, limit=50)
    assert (len(loaded), loaded.available) == (50, 520)
    with pytest.raises(SafeSteerError, match="--limit 0: leaves no prompt"):
        ids(0)


def test_own_prompts(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        [{"question": LOCK, "category": "crime"}, {"question": LOCK.upper()}, {"question": "y" * 40_000}],
    )
    loaded = own_prompts(path, "harmful")
    assert [(p.id, p.prompt, p.kind, p.category) for p in loaded] == [("00000", LOCK, "harmful", "crime")]
    assert loaded.skipped == Skipped(duplicates=1, overlong=1)
    path.write_text('{"question": "a"}\n{"question": ""}\n')
    with pytest.raises(SafeSteerError, match="line 2: field 'question' is empty"):
        own_prompts(path, "harmless")


def test_the_registry_is_complete() -> None:
    required = (
        "advbench pku-saferlhf harmbench jailbreakbench sorry-bench harmfulqa alert strongreject xstest-safe"
    )
    required += " xstest-unsafe or-bench-hard jailbreakbench-benign alarming"
    assert set(required.split()) <= set(BENCHMARKS)
    assert SUITES["paper"] == tuple(required.split()[:7])
    for benchmark in BENCHMARKS.values():
        assert benchmark.licence and benchmark.title and benchmark.authors_judge and benchmark.size > 0
        if benchmark.package_file is None:
            assert benchmark.local_paths and benchmark.citation
            assert (benchmark.hub_id is None) != (benchmark.published is None)
        if benchmark.hub_id is not None:
            assert benchmark.revision is not None and len(bytes.fromhex(benchmark.revision)) == 20
    for names in SUITES.values():
        assert len(set(names)) == len(names)
        for name in names:
            benchmark_named(variant_named(name).benchmark)
    over_refusal = {benchmark_named(name).kind for name in SUITES["over-refusal"]}
    assert over_refusal == {"harmless", "harmful"}


def test_the_documentation_tells_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for benchmark in BENCHMARKS.values():
        (line,) = [
            line for line in page.splitlines() if line.startswith(f"| `{benchmark.name}` | {benchmark.title}")
        ]
        told = [benchmark.title, benchmark.licence, benchmark.authors_judge]
        if benchmark.package_file is None:
            told += [f"| {benchmark.size:,} |", benchmark.local_paths[0]]
            told += [f"`{benchmark.hub_id}`" if benchmark.hub_id else str(benchmark.published)]
        told.append("| refused |" if benchmark.kind == "harmful" else "| answered |")
        assert not [part for part in told if part not in line]
        assert ("(terms)" in line) == (benchmark.gated is not None)
    for suite in SUITES:
        assert f"| `{suite}` |" in page
