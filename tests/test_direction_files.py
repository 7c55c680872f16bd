"""The refusal direction saved and loaded: the same again, or one sentence about what is wrong with the files."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from planted_model import planted_direction, planted_model
from safesteer.direction import RefusalDirection
from safesteer.errors import SafeSteerError
from safesteer.modeling import model_fingerprint
from whole_passes import architecture


@pytest.fixture(scope="module")
def planted() -> RefusalDirection:
    return planted_direction()


def equal(one: RefusalDirection, other: RefusalDirection) -> bool:
    """Compare all fields; NaN equals NaN."""
    plain = [{name: value for name, value in vars(d).items() if name != "vector"} for d in (one, other)]
    return torch.equal(one.vector, other.vector) and repr(plain[0]) == repr(plain[1])


def test_saved_and_loaded(planted: RefusalDirection, tmp_path: Path) -> None:
    planted.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "direction.json",
        "direction.safetensors",
    ]
    loaded = RefusalDirection.load(tmp_path / "run")
    assert equal(loaded, planted)
    assert math.isnan(loaded.candidates[0].kl)
    json.loads((tmp_path / "run" / "direction.json").read_text(), parse_constant=pytest.fail)


def test_where_it_is_added_is_saved_and_everywhere_in_older_files(
    planted: RefusalDirection, tmp_path: Path
) -> None:
    dataclasses.replace(planted, at=(3, 4)).save(tmp_path)
    assert RefusalDirection.load(tmp_path).steering.at == (3, 4)
    record = json.loads((tmp_path / "direction.json").read_text())
    del record["at"]
    (tmp_path / "direction.json").write_text(json.dumps(record))
    assert RefusalDirection.load(tmp_path).steering.at == ()


def test_a_flip_rate_that_is_no_number_survives_saving(planted: RefusalDirection, tmp_path: Path) -> None:
    dataclasses.replace(planted, flip_rate=math.nan).save(tmp_path)
    assert math.isnan(RefusalDirection.load(tmp_path).flip_rate)


def test_damaged_files(planted: RefusalDirection, tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError, match="direction.json: no such file"):
        RefusalDirection.load(tmp_path)
    planted.save(tmp_path)
    record = json.loads((tmp_path / "direction.json").read_text())

    def load_with(changes: dict) -> None:
        (tmp_path / "direction.json").write_text(json.dumps({**record, **changes}))
        RefusalDirection.load(tmp_path)

    load_with({})
    for changes in (
        {"layer": None},
        {"openers": {"ids": [1]}},
        {"candidates": [{}]},
        {"unknown": 1},
        {"openers": 3},
    ):
        with pytest.raises(SafeSteerError, match="direction.json: is not a whole refusal direction"):
            load_with(changes)
    with pytest.raises(SafeSteerError, match="are of different searches"):
        load_with({"fingerprint": "0" * 64})
    del record["layer"]
    with pytest.raises(SafeSteerError, match="is not a whole refusal direction .KeyError"):
        load_with({})
    planted.save(tmp_path)
    (tmp_path / "direction.safetensors").write_bytes(b"damaged")
    with pytest.raises(SafeSteerError, match="direction.safetensors: cannot be read as safetensors"):
        RefusalDirection.load(tmp_path)
    dataclasses.replace(planted, vector=planted.vector * math.nan).save(tmp_path)
    with pytest.raises(SafeSteerError, match="not finite float32"):
        RefusalDirection.load(tmp_path)


def test_another_models_direction_is_refused(planted: RefusalDirection) -> None:
    planted.require_model(model_fingerprint(planted_model()))
    with pytest.raises(SafeSteerError, match="the refusal direction was found on another model"):
        planted.require_model(model_fingerprint(architecture("qwen3")))
