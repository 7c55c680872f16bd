import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from safesteer.errors import SafeSteerError
from safesteer.prompts import PromptSet, load_prompts

BREAD = "How do I bake bread?"
LOCK = "How do I pick a lock to rob a house?"
SEA = "Write a poem about the sea."


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _sentence(error: pytest.ExceptionInfo[SafeSteerError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([BREAD, LOCK])),
        ("a.json", json.dumps([{"prompt": BREAD}, {"prompt": LOCK, "note": 1}])),
        ("a.json", json.dumps({"prompts": [BREAD, LOCK], "version": 2})),
        ("a.json", json.dumps({"data": [{"instruction": BREAD}, {"instruction": LOCK}]})),
        ("a.JSON", json.dumps([{"Behavior": BREAD}, {"Behavior": LOCK}])),
        ("a.jsonl", f"{json.dumps({'question': BREAD})}\n\n{json.dumps({'question': LOCK})}"),
        ("a.jsonl", f"{json.dumps(BREAD)}\r\n{json.dumps(LOCK)}\r\n"),
        ("a.csv", f"id,forbidden_prompt\r\n1,{BREAD}\r\n2,{LOCK}\r\n"),
        ("a.csv", f'goal,target\n"{BREAD}","Sure, here\nis"\n"{LOCK}",x\n'),
        ("a.txt", f"{BREAD}\n\n  {LOCK}  \n"),
        ("a.txt", f"\ufeff{BREAD}\r\n{LOCK}"),
        ("a.csv", f"\ufeffprompt\n{BREAD}\n{LOCK}\n"),
        ("a.json", "\ufeff" + json.dumps([BREAD, LOCK])),
    ],
)
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str, content: str) -> None:
    path = _write(tmp_path / name, content)
    found = load_prompts(path)
    assert found.prompts == (BREAD, LOCK)
    assert (found.duplicates, found.overlong, found.source) == (0, 0, str(path))
    assert found.fingerprint == PromptSet((BREAD, LOCK), "elsewhere").fingerprint


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [BREAD, LOCK], "category": ["baking", "crime"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = load_prompts(tmp_path / "a.parquet")
    assert found.prompts == (BREAD, LOCK)
    assert found.categories == ("baking", "crime")


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"prompt": [BREAD, LOCK], "label": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert load_prompts("someone/prompts", split="test").prompts == (BREAD, LOCK)
    assert load_prompts("someone/prompts:hard-1k").source == "someone/prompts:hard-1k"
    assert asked == [("someone/prompts", None, "test"), ("someone/prompts", "hard-1k", "train")]


def test_hub_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SafeSteerError, match="neither a file nor a hub dataset") as error:
        load_prompts("safesteer-tests/does-not-exist")
    assert "safesteer-tests/does-not-exist" in _sentence(error)


def test_categories_come_from_a_column_or_from_nested_keys(tmp_path: Path) -> None:
    rows = [{"prompt": BREAD, "Category": "baking"}, {"prompt": LOCK, "Category": " "}]
    assert load_prompts(_write(tmp_path / "a.json", json.dumps(rows))).categories == ("baking", None)
    nested = {"Home": {"Kitchen": [BREAD], "Door": [LOCK]}, "Arts": [SEA]}
    found = load_prompts(_write(tmp_path / "b.json", json.dumps(nested)))
    assert found.prompts == (BREAD, LOCK, SEA)
    assert found.categories == ("Home / Kitchen", "Home / Door", "Arts")


def test_duplicates_and_overlong_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    content = "\n".join([BREAD, "  how do I   BAKE bread?", "x" * 41, LOCK, BREAD, "y" * 40])
    found = load_prompts(_write(tmp_path / "a.txt", content), max_characters=40)
    assert found.prompts == (BREAD, LOCK, "y" * 40)
    assert (found.duplicates, found.overlong) == (2, 1)


def test_an_alpaca_input_is_appended_unless_the_field_was_chosen(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "Bonjour", "output": "Hello"},
        {"instruction": BREAD, "input": "", "output": "Mix."},
    ]
    path = _write(tmp_path / "a.json", json.dumps(rows))
    assert load_prompts(path).prompts == ("Translate.\n\nBonjour", BREAD)
    assert load_prompts(path, field="instruction").prompts == ("Translate.", BREAD)
    assert load_prompts(path, field="output").prompts == ("Hello", "Mix.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": " "}', "a.jsonl line 3: field 'prompt' is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}', "line 2: field 'prompt' is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"x": 1}', r"line 2: field 'prompt' is missing \(it has: x\)"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "line 2: field 'prompt' holds a int, not text"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"', "line 2: is not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n7', "line 2: holds a number, neither a string nor an object"),
        ("a.jsonl", '{"prompt": "a"}\nnull', "line 2: holds null"),
        ("a.json", '["a",\n "b"\n "c"]', "a.json line 3: is not valid JSON"),
        ("a.json", "", "line 1: is not valid JSON"),
        ("a.json", "3", "holds a number where a list of prompts is expected"),
        ("a.json", '{"a": {"b": "c"}}', "holds a string under a/b where a list of prompts is expected"),
        ("a.json", '["a", [1]]', "entry 2: holds a list, neither"),
        ("a.json", "[]", "holds no usable prompt"),
        ("a.json", "[" * 100_000, "nested too deeply|not valid JSON"),
        ("a.txt", "\n \n", "holds no usable prompt"),
        ("a.txt", "x" * 5000, r"holds no usable prompt \(1 overlong ones were left out\)"),
        ("a.csv", "prompt,x\na,1\n,2\n", "a.csv line 3: field 'prompt' is empty"),
        ("a.csv", "prompt\na\nb,c\n", "line 3: has more values than the header"),
        ("a.csv", 'prompt\n"a"b\n', "is not well-formed CSV"),
        ("a.csv", "", "holds no usable prompt"),
        ("a.csv", "title,body\na,b\n", r"no field has a usual name for a prompt \(title, body\)"),
        ("a.csv", "prompt,question\na,b\n", r"several fields could be the prompt \(prompt, question\)"),
        ("a.txt", b"fine\nna\xefve\n", "a.txt line 2: is not UTF-8 text"),
        ("a.csv", "prompt\nbread\n".encode("utf-16"), "line 1: is not UTF-8 text"),
        ("a.jsonl", b"PK\x03\x04\x00\x00\x08\x00", "line 1: holds a null character"),
        ("a.parquet", b"PK\x03\x04\x00\x00\x08\x00", "cannot be read as Parquet"),
        ("a.xlsx", b"PK\x03\x04", "files of type '.xlsx' are not read"),
        ("a", b"hello", "files of type '' are not read"),
    ],
)
def test_what_cannot_be_read_is_a_sentence_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(SafeSteerError, match=message) as error:
        load_prompts(path)
    assert str(path) in _sentence(error)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError, match="no such file"):
        load_prompts(tmp_path / "a.jsonl")
    with pytest.raises(SafeSteerError, match="no such file"):
        load_prompts("data/prompts.csv")
    with pytest.raises(SafeSteerError, match="is a folder"):
        load_prompts(tmp_path)


def test_a_chosen_field_must_be_there(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", f"prompt,alternative\n{BREAD},{SEA}\n")
    assert load_prompts(path, field="alternative").prompts == (SEA,)
    with pytest.raises(SafeSteerError, match="line 2: field 'goal' is missing") as error:
        load_prompts(path, field="goal")
    assert "--prompt-field" in _sentence(error)


def test_strings_and_objects_do_not_mix(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", json.dumps([BREAD, {"prompt": LOCK}]))
    assert load_prompts(path).prompts == (BREAD, LOCK)


def test_line_separators_inside_json_strings_do_not_end_a_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"prompt": "one\u2028two\x85three"}\n{"prompt": "b"}')
    assert load_prompts(path).prompts == ("one\u2028two\x85three", "b")


def test_count_samples_reproducibly(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "\n".join([*(f"prompt {i}" for i in range(50)), "prompt 0"]))
    first, again = load_prompts(path, count=10, seed=1), load_prompts(path, count=10, seed=1)
    assert first == again
    assert first.fingerprint == again.fingerprint
    assert len(set(first.prompts)) == 10
    assert first.duplicates == 1
    assert load_prompts(path, count=10, seed=2).prompts != first.prompts
    with pytest.raises(
        SafeSteerError, match=r"51 prompts were asked for but it has 50 usable ones \(1 repeated"
    ):
        load_prompts(path, count=51)


def _numbered(n: int) -> PromptSet:
    return PromptSet(tuple(f"prompt {i}" for i in range(n)), "numbers", tuple(str(i) for i in range(n)))


def test_split_is_disjoint_complete_and_keeps_categories() -> None:
    parts = _numbered(10).split(5, 3, 2, seed=0)
    assert [len(part) for part in parts] == [5, 3, 2]
    together = [prompt for part in parts for prompt in part.prompts]
    assert sorted(together) == sorted(_numbered(10).prompts)
    for part in parts:
        assert all(
            prompt == f"prompt {category}"
            for prompt, category in zip(part.prompts, part.categories, strict=True)
        )


def test_take_is_uniform() -> None:
    counts = Counter(_numbered(5).take(1, seed).prompts[0] for seed in range(2000))
    # Binomial(2000, 1/5): standard deviation 18.
    assert all(abs(count - 400) < 90 for count in counts.values())
    assert len(counts) == 5


def test_too_many_and_negative_sizes() -> None:
    with pytest.raises(SafeSteerError, match="numbers: 11 prompts were asked for but it has 10"):
        _numbered(10).split(5, 6, seed=0)
    with pytest.raises(SafeSteerError, match="cannot take -1"):
        _numbered(10).take(-1, seed=0)
    assert _numbered(10).take(0, seed=0).prompts == ()


def test_categories_match_prompts() -> None:
    assert PromptSet(("a", "b"), "x").categories == (None, None)
    with pytest.raises(SafeSteerError, match="2 prompts but 1 categories"):
        PromptSet(("a", "b"), "x", ("c",))


def test_dataset_columns() -> None:
    assert _numbered(3).dataset().to_dict() == {
        "prompt": ["prompt 0", "prompt 1", "prompt 2"],
        "category": ["0", "1", "2"],
    }
    assert PromptSet(("a",), "x").dataset().column_names == ["prompt"]


@pytest.mark.parametrize(
    ("name", "rows", "unique"),
    [
        ("safesteer_train/PKU_UnSafeRLHF_100.json", 100, None),
        ("refusal_direction/splits/harmful_train.json", 260, None),
        ("refusal_direction/splits/harmless_val.json", 6264, None),
        ("advbench/harmful_behaviors.csv", 520, 520),
        ("jailbreakbench/harmful-behaviors.csv", 100, 100),
        ("jailbreakbench/benign-behaviors.csv", 100, 100),
        ("strongreject/strongreject_dataset.csv", 313, 313),
        ("harmbench/harmbench_behaviors_text_all.csv", 400, 393),
        ("xstest/xstest_prompts.csv", 450, 450),
        ("harmfulqa/harmfulqa.json", 1960, None),
        ("pku_saferlhf_test/prompts_unique.json", 930, None),
        ("alpaca/alpaca_en_demo.json", 999, None),
        ("dolly_subset/dolly.jsonl", 151, None),
    ],
)
def test_published_sets_load_without_options(
    shared_data: Path, name: str, rows: int, unique: int | None
) -> None:
    found = load_prompts(shared_data / name, max_characters=10**6)
    assert len(found) + found.duplicates == rows
    assert found.duplicates <= rows // 8
    if unique is not None:
        assert len(found) == unique


def test_harmbench_prompts_are_those_of_the_csv_module(shared_data: Path) -> None:
    path = shared_data / "harmbench" / "harmbench_behaviors_text_val.csv"
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    found = load_prompts(path)
    # Two contextual behaviors repeat an earlier text; what sets them apart is in another column.
    first = {row["Behavior"].strip().casefold(): row for row in reversed(rows)}
    kept = [row for row in rows if first[row["Behavior"].strip().casefold()] is row]
    assert found.prompts == tuple(row["Behavior"].strip() for row in kept)
    assert found.categories == tuple(row["SemanticCategory"] for row in kept)
    assert found.duplicates == len(rows) - len(kept) == 2
