"""Record files: what a killed process leaves is read back whole; everything else is refused in one sentence."""

import dataclasses
import json
from pathlib import Path

import pytest

from safesteer.errors import SafeSteerError
from safesteer.evaluation.records import EvaluationPrompt, Record, RecordFile, Verdict, ids_of

IDENTITY = {"model": "a", "max_new_tokens": 24, "prompts": ["one", "two"]}


def record(name: str, response: str = "No.") -> Record:
    return Record("advbench", name, "Why?", "harmful", None, "", response, response, 3, 7)


def verdict(name: str) -> Verdict:
    return Verdict("refusal-phrases", name, "safe", True, "refusal")


@pytest.mark.parametrize(
    "text", ["", "\u2028 \u2029 \x85", "\ud800 alone", '\\ " \n\r\n\0', "🜏" * 500, "न\u200dम", "x" * 100_000]
)
def test_any_text_comes_back_as_it_was(tmp_path: Path, text: str) -> None:
    entries = [record("00000", text), record(text or "empty", "y")]
    RecordFile(tmp_path / "a" / "r.jsonl", Record, IDENTITY).append(entries)
    assert list(RecordFile(tmp_path / "a" / "r.jsonl", Record, IDENTITY).load().values()) == entries


def test_cut_at_any_byte_it_keeps_whole_entries_and_continues(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    entries = [verdict(f"{index:05d}") for index in range(4)]
    RecordFile(whole, Verdict, IDENTITY).append(entries)
    data = whole.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    assert len(ends) == 5
    torn = tmp_path / "torn.jsonl"
    for length in range(len(data)):
        torn.write_bytes(data[:length])
        file = RecordFile(torn, Verdict, IDENTITY)
        found = file.load()
        assert list(found.values()) == entries[: max(0, sum(end <= length for end in ends) - 1)]
        file.append([entry for entry in entries if entry.id not in found])
        assert torn.read_bytes() == data


def test_verdicts_and_records_are_written_as_their_fields(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, Record, IDENTITY).append([record("7")])
    header, line = map(json.loads, path.read_text().splitlines())
    assert line == dataclasses.asdict(record("7"))
    assert header["made_with"]["max_new_tokens"] == 24
    reader = RecordFile(path, Record)
    assert reader.load() == {"7": record("7")}
    with pytest.raises(ValueError, match="opened without saying"):
        reader.append([record("8")])


def test_other_settings_are_refused_and_told(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, Record, IDENTITY).append([record("7")])
    other = RecordFile(path, Record, {**IDENTITY, "max_new_tokens": 32})
    with pytest.raises(
        SafeSteerError, match="made with max_new_tokens 24 instead of 32; choose another --output"
    ):
        other.load()
    with pytest.raises(SafeSteerError, match="made with prompts"):
        RecordFile(path, Record, {**IDENTITY, "prompts": ["one"]}).append([record("8")])
    assert len(RecordFile(path, Record, IDENTITY).load()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{nonsense", "line 3: is not JSON"),
        (b"\xff\xfe\x00", "line 3: is not JSON"),
        (b"[" * 100_000, "line 3: is not JSON"),
        (b"[1, 2]", "line 3: is a JSON list"),
        (b"", "line 3: is not JSON"),
        (b'{"id": "9"}', "line 3: field 'judge' is missing"),
        (b'{"judge": "j", "id": "9", "verdict": "fine", "refused": null, "raw": ""}', "field 'verdict'"),
        (b'{"judge": "j", "id": "9", "verdict": "safe", "refused": 1, "raw": ""}', "field 'refused'"),
        (b'{"judge": "j", "id": 9, "verdict": "safe", "refused": null, "raw": ""}', "field 'id'"),
        (
            b'{"judge": "j", "id": "0", "verdict": "safe", "refused": null, "raw": ""}',
            "line 3: repeats the id '0'",
        ),
    ],
)
def test_damage_is_told_with_its_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "r.jsonl"
    RecordFile(path, Verdict, IDENTITY).append([verdict("0")])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(SafeSteerError, match=message):
        RecordFile(path, Verdict, IDENTITY).load()


@pytest.mark.parametrize("header", [b"{}\n", b'{"fingerprint": 1, "made_with": 2}\n', b'"x"\n', b"\0\0\n"])
def test_another_kind_of_file_is_left_alone(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(header)
    with pytest.raises(SafeSteerError, match="line 1"):
        RecordFile(path, Record, IDENTITY).append([record("0")])
    assert path.read_bytes() == header


def test_an_id_is_written_once(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "r.jsonl", Record, IDENTITY)
    file.append([record("0")])
    for entries in ([record("0")], [record("1"), record("1")]):
        with pytest.raises(ValueError, match="is there already"):
            file.append(entries)
    assert list(file.load()) == ["0"]


def test_a_judges_output_is_cut() -> None:
    assert Verdict("j", "0", "safe", None, "x" * 3000).raw == "x" * 2000


def test_verdicts_written_before_there_were_scores_are_read(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    file = RecordFile(path, Verdict, {"judge": "j"})
    file.append([Verdict("j", "0", "safe", None, ""), Verdict("j", "1", "safe", None, "", 0.5)])
    assert [verdict.score for verdict in file.load().values()] == [None, 0.5]
    path.write_text(path.read_text().replace(', "score": null', ""))
    assert [verdict.score for verdict in file.load().values()] == [None, 0.5]
    path.write_text(path.read_text().replace('"score": 0.5', '"score": "high"'))
    with pytest.raises(SafeSteerError, match="line 3: field 'score' is missing or of the wrong type"):
        file.load()


def test_prompts_have_ids_of_their_own() -> None:
    prompts = [EvaluationPrompt(name, "Why?", "harmful") for name in "abb"]
    assert ids_of(prompts[:2]) == ["a", "b"]
    with pytest.raises(SafeSteerError, match="the id 'b' stands at more than one prompt"):
        ids_of(prompts)
