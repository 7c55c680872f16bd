import dataclasses
import hashlib
import json
import math
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safesteer.artifacts import (
    fingerprint,
    new_directory,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from safesteer.errors import SafeSteerError, one_line


@dataclasses.dataclass(frozen=True)
class _Settings:
    rate: float
    folder: Path
    sizes: tuple[int, ...]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_fingerprint_is_the_sha256_of_canonical_json() -> None:
    canonical = '{"a":[1,2.5,null],"b":"\\u00e9"}'
    assert fingerprint({"b": "é", "a": (1, 2.5, None)}) == hashlib.sha256(canonical.encode()).hexdigest()


def test_fingerprint_sees_through_dataclasses_paths_and_tuples() -> None:
    settings = _Settings(0.1, Path("runs/one"), (1, 2))
    assert fingerprint(settings) == fingerprint({"sizes": [1, 2], "folder": "runs/one", "rate": 0.1})
    assert fingerprint(settings) != fingerprint(dataclasses.replace(settings, rate=0.2))
    assert fingerprint({3, 1, 2}) == fingerprint([1, 2, 3])


def test_fingerprint_tells_tensors_apart_by_value_dtype_and_shape() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    others = [tensor + 1, tensor.double(), tensor.reshape(2, 3), tensor.bfloat16()]
    prints = {fingerprint({"vector": value}) for value in [tensor, *others]}
    assert len(prints) == 5
    assert fingerprint(tensor.reshape(2, 3).t().contiguous().t()) == fingerprint(tensor.reshape(2, 3))


def test_fingerprint_refuses_what_has_no_canonical_form() -> None:
    with pytest.raises(TypeError, match="object has no canonical"):
        fingerprint(object())
    with pytest.raises(TypeError, match="keys other than strings"):
        fingerprint({1: "a"})


@given(json_values)
def test_equal_values_have_equal_fingerprints(value: object) -> None:
    assert fingerprint(value) == fingerprint(json.loads(json.dumps(value)))


@given(value=st.dictionaries(st.text(), json_values, max_size=4))
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: dict[str, object]) -> None:
    path = tmp_path_factory.mktemp("json") / "deep" / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]


def test_written_json_is_read_by_strict_readers(tmp_path: Path) -> None:
    write_json(
        tmp_path / "a.json",
        {"score": math.nan, "high": math.inf, "settings": _Settings(1.0, Path("x"), (1,))},
    )
    text = (tmp_path / "a.json").read_text()

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {
        "score": None,
        "high": None,
        "settings": {"rate": 1.0, "folder": "x", "sizes": [1]},
    }
    assert text.endswith("}\n")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(UnicodeEncodeError):
        write_json(path, {"new": "\ud800"})
    assert read_json(path) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'a': 1}", "cannot be read as JSON"),
        (b'{"a": 1', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
    ],
)
def test_corrupt_json_is_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SafeSteerError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert "a.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError, match="no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(SafeSteerError, match="no such file"):
        read_tensors(tmp_path / "a.safetensors")


def test_tensors_round_trip_exactly(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    tensors = {
        "vector": torch.randn(7, dtype=torch.float64),
        "half": torch.randn(2, 3).bfloat16(),
        "view": shared.t(),
        "same_storage": shared,
        "ids": torch.tensor([3, 1]),
        "trained": torch.nn.Parameter(torch.randn(2)),
    }
    write_tensors(tmp_path / "deep" / "a.safetensors", tensors, {"layer": "12"})
    read, metadata = read_tensors(tmp_path / "deep" / "a.safetensors")
    assert metadata == {"layer": "12"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def test_tensors_without_metadata(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert read_tensors(tmp_path / "a.safetensors")[1] == {}


def test_truncated_tensors_are_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SafeSteerError, match="cannot be read as safetensors"):
        read_tensors(path)


def test_pickled_tensors_are_never_loaded(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(SafeSteerError, match="cannot be read as safetensors"):
        read_tensors(tmp_path / "a.safetensors")


def test_new_directory_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "model"
    with new_directory(target) as folder:
        (folder / "weights").write_text("1")
        assert not target.exists()
    assert (target / "weights").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_new_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_directory(target) as folder:
        (folder / "old").write_text("1")
    with new_directory(target) as folder:
        (folder / "new").write_text("2")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_directory(target) as folder:
        (folder / "old").write_text("1")
    with pytest.raises(KeyboardInterrupt), new_directory(target) as folder:
        (folder / "new").write_text("2")
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_line_folds_and_shortens() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("word " * 100), limit=50)) <= 50
