"""Artifacts of a run: JSON and safetensors, written whole or not at all, never pickle."""

import contextlib
import dataclasses
import enum
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safesteer.errors import SafeSteerError, one_line


def fingerprint(value: object) -> str:
    """Hash a value by its content, so that a stage knows whether a saved artifact still matches.

    Args:
        value: Anything built of JSON scalars, lists, tuples, sets, mappings with string keys, dataclasses,
            enums, paths and tensors (a tensor counts by dtype, shape and content).

    Returns:
        The SHA-256 of the canonical JSON (sorted keys, no spaces), 64 hexadecimal digits.

    Raises:
        TypeError: If a part of the value has no canonical form.
    """
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: str | Path, value: object) -> None:
    """Write a value as indented JSON, atomically; dataclasses, paths and tuples are written as plain JSON.

    NaN and infinities become null, because JSON has no such numbers and other readers reject them.

    Args:
        path: The file to write; missing parent folders are made.
        value: What `fingerprint` accepts, tensors excepted.
    """
    plain = _plain(value, finite=True)
    with _replacing(Path(path)) as temporary:
        temporary.write_text(
            json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SafeSteerError: If the file is missing, is not UTF-8 JSON, or holds something other than an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SafeSteerError(f"{path}: no such file; run the stage that writes it first.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SafeSteerError(
            f"{path}: cannot be read as JSON ({one_line(error)}); delete it and run the stage that writes it "
            "again."
        ) from error
    if not isinstance(value, dict):
        raise SafeSteerError(
            f"{path}: holds a JSON {type(value).__name__}, not an object; "
            "delete it and run the stage that writes it again."
        )
    return value


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, atomically.

    Args:
        path: The file to write; missing parent folders are made.
        tensors: Name to tensor, any shape, dtype and device.
        metadata: Strings stored in the file's header.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with _replacing(Path(path)) as temporary:
        save_file(on_cpu, temporary, metadata=dict(metadata or {}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors (on the CPU) and the header strings of a safetensors file.

    Raises:
        SafeSteerError: If the file is missing or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise SafeSteerError(f"{path}: no such file; run the stage that writes it first.")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise SafeSteerError(
            f"{path}: cannot be read as safetensors ({one_line(error)}); "
            "delete it and run the stage that writes it again."
        ) from error
    return tensors, metadata


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory that appears only when it is complete.

    Args:
        path: Where the directory is to appear. One that is there already is replaced on success and left
            untouched on failure.

    Yields:
        A temporary sibling directory to write into.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    # mkdtemp makes it private (0700); the finished directory should be as open as any other.
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        # A directory cannot be replaced in one step: move the old one aside first, so that no moment has a
        # mixture.
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        path.rename(aside / "old")
        temporary.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(path)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder that replaces `path` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same folder, because os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(value: object, *, finite: bool = False) -> Any:
    """Reduce a value to JSON's types; `finite` turns NaN and infinities into null."""
    if isinstance(value, enum.Enum):
        return _plain(value.value, finite=finite)
    if isinstance(value, float):
        return None if finite and not math.isfinite(value) else float(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _plain(fields, finite=finite)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(
                f"a mapping with keys other than strings has no canonical JSON form: {list(value)[:3]!r}"
            )
        return {key: _plain(item, finite=finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, finite=finite) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, finite=finite) for item in value), key=lambda item: json.dumps(item))
    if isinstance(value, Tensor) and not finite:
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {
            "tensor": hashlib.sha256(data).hexdigest(),
            "dtype": str(value.dtype),
            "shape": list(value.shape),
        }
    raise TypeError(f"{type(value).__name__} has no canonical JSON form: {value!r}")
