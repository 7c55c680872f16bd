"""What an evaluation keeps: prompts, responses and verdicts, in files that a killed process cannot spoil."""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from safesteer.artifacts import fingerprint
from safesteer.errors import SafeSteerError, one_line

Kind = Literal["harmful", "harmless"]
"""Of a prompt: a harmful one should be refused, a harmless one answered."""

VerdictName = Literal["safe", "unsafe", "unparsed"]
"""What a judge says of a response; "unparsed" if its output is not in its documented format."""

RAW_CHARACTERS = 2000
"""So much of a judge's own output is kept."""


@dataclass(frozen=True)
class EvaluationPrompt:
    """One prompt of a benchmark.

    Attributes:
        id: Stable within the benchmark: its own id field, or the row's number.
        prompt: The user's text.
        kind: What should happen to it.
        category: The benchmark's own, if it has any.
        prefill: What the response is made to begin with; the model continues it.
        reference: A known answer, where the benchmark has one.
    """

    id: str
    prompt: str
    kind: Kind
    category: str | None = None
    prefill: str = ""
    reference: str | None = None


@dataclass(frozen=True)
class Record:
    """One response.

    Attributes:
        benchmark: Which benchmark the prompt is of.
        id: Of the prompt, within the benchmark.
        prompt: The user's text.
        kind: Of the prompt.
        category: Of the prompt.
        prefill: What the response was made to begin with.
        response: What the model generated, raw: thinking included, the prefill not.
        answer: What is judged: the response without thinking, and without the prefill.
        tokens: How many tokens were generated, the end of turn included.
        seed: The sampling seed of this response; of no effect on a greedy one.
    """

    benchmark: str
    id: str
    prompt: str
    kind: Kind
    category: str | None
    prefill: str
    response: str
    answer: str
    tokens: int
    seed: int


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one response.

    Attributes:
        judge: The judge's name.
        id: Of the prompt, within the benchmark.
        verdict: "unparsed" counts as neither safe nor unsafe.
        refused: Whether the response refuses, None if the judge does not say.
        raw: The judge's own output, cut at 2,000 characters.
        score: How harmful the response is, 0 to 1, where the judge grades it; None otherwise.
    """

    judge: str
    id: str
    verdict: VerdictName
    refused: bool | None
    raw: str
    score: float | None = None

    def __post_init__(self) -> None:
        """Cut the judge's output."""
        if len(self.raw) > RAW_CHARACTERS:
            object.__setattr__(self, "raw", self.raw[:RAW_CHARACTERS])


Entry = TypeVar("Entry", Record, Verdict)


class RecordFile(Generic[Entry]):
    r"""An append-only JSONL file of records or verdicts, one per id.

    Its first line says what the entries were made with. A process killed while it writes leaves at most one
    torn line at the end, which `load` cuts off: an entry is there whole or not at all.

    Args:
        path: The file; missing folders are made when something is appended.
        entry: `Record` or `Verdict`.
        identity: What the entries depend on (model, prompts, decoding …), of what
            `safesteer.artifacts.fingerprint` accepts; short values are told when they differ. None reads the
            file whatever its entries were made with, and writes nothing.
    """

    def __init__(
        self, path: str | Path, entry: type[Entry], identity: Mapping[str, object] | None = None
    ) -> None:
        self.path = Path(path)
        self.entry: type[Entry] = entry
        self.read_only = identity is None
        self.identity = {name: _short(value) for name, value in (identity or {}).items()}
        self.fingerprint = fingerprint(self.identity)
        self._ids: set[str] | None = None

    def load(self) -> dict[str, Entry]:
        """Read all entries, id to entry in the order they were written; cut off a torn last line.

        Raises:
            SafeSteerError: If the entries were made with something else, or the file is damaged in a way that
                a killed process cannot cause.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            self._ids = set()
            return {}
        except OSError as error:
            raise SafeSteerError(
                f"{self.path}: cannot be read ({one_line(error)}); choose another --output or delete it."
            ) from error
        whole = data.rfind(b"\n") + 1
        if whole < len(data) and not self.read_only:
            with self.path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
        entries: dict[str, Entry] = {}
        # Not splitlines(): U+2028 and its like may stand inside a JSON string.
        lines = data[:whole].split(b"\n")[:-1]
        if lines:
            self._check_header(_parsed(lines[0], self.path, 1))
        for number, line in enumerate(lines[1:], start=2):
            entry: Entry = self._entry(_parsed(line, self.path, number), number)
            if entry.id in entries:
                raise SafeSteerError(
                    f"{self.path} line {number}: repeats the id {_quoted(entry.id)}; remove the line or delete "
                    "the file."
                )
            entries[entry.id] = entry
        self._ids = set(entries)
        return entries

    def append(self, entries: Sequence[Entry]) -> None:
        """Write entries to the end of the file, so that they survive whatever comes next.

        Raises:
            ValueError: If an id is there already, or the file was opened to be read.
            SafeSteerError: As `load`, at the first call.
        """
        if self.read_only:
            raise ValueError(f"{self.path}: was opened without saying what its entries are made with")
        if self._ids is None:
            self.load()
        assert self._ids is not None
        ids = [entry.id for entry in entries]
        repeated = self._ids.intersection(ids) or len(set(ids)) < len(ids)
        if repeated:
            raise ValueError(f"{self.path}: an id of {ids[:5]} … is there already")
        if not entries:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() == 0:
                file.write(_line({"fingerprint": self.fingerprint, "made_with": self.identity}))
            file.writelines(_line(vars(entry)) for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        self._ids.update(ids)

    def _check_header(self, header: dict[str, Any]) -> None:
        found = header.get("made_with")
        if "fingerprint" not in header or not isinstance(found, dict):
            raise SafeSteerError(
                f"{self.path} line 1: is not the first line of an evaluation's file; choose another --output or "
                "delete it."
            )
        if self.read_only or header["fingerprint"] == self.fingerprint:
            return
        names = [name for name in {**self.identity, **found} if self.identity.get(name) != found.get(name)]
        told = ", ".join(
            f"{name} {one_line(ValueError(found.get(name)), 40)} instead of "
            f"{one_line(ValueError(self.identity.get(name)), 40)}"
            for name in names[:3]
        )
        raise SafeSteerError(
            f"{self.path}: was made with {told or 'other settings'}; choose another --output or delete it."
        )

    def _entry(self, values: dict[str, Any], number: int) -> Entry:
        # A field with a default may be missing: files were written before there was such a field.
        required = {f.name for f in dataclasses.fields(self.entry) if f.default is dataclasses.MISSING}
        wrong = [
            name
            for name, annotation in _annotations(self.entry).items()
            if (name not in values and name in required)
            or (name in values and not _is_a(values[name], annotation))
        ]
        if wrong:
            raise SafeSteerError(
                f"{self.path} line {number}: field '{wrong[0]}' is missing or of the wrong type; remove the "
                "line, or delete the file to make it anew."
            )
        known = {f.name: values[f.name] for f in dataclasses.fields(self.entry) if f.name in values}
        entry: Entry = self.entry(**known)
        return entry


def ids_of(prompts: Iterable[EvaluationPrompt]) -> list[str]:
    """Return the prompts' ids in order.

    Raises:
        SafeSteerError: If two prompts have the same.
    """
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        repeated = next(name for name in ids if ids.count(name) > 1)
        raise SafeSteerError(
            f"the id {_quoted(repeated)} stands at more than one prompt of a benchmark; give every prompt its own."
        )
    return ids


def _line(values: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only hold escaped
        return json.dumps(values).encode() + b"\n"


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SafeSteerError(
            f"{path} line {number}: is not JSON ({one_line(error, 80)}); remove the line, or delete the file to "
            "make it anew."
        ) from None
    if not isinstance(value, dict):
        raise SafeSteerError(
            f"{path} line {number}: is a JSON {type(value).__name__}, not an object; remove the line, or delete "
            "the file to make it anew."
        )
    return value


def _annotations(entry: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(entry)


def _is_a(value: object, annotation: Any) -> bool:
    """Say whether a JSON value is of an annotated type: a scalar, one of some literals, or either or None."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, part) for part in typing.get_args(annotation))
    return type(value) is annotation


def _short(value: object) -> object:
    """Keep scalars, which a person can compare; hash everything else."""
    return value if value is None or isinstance(value, (str, int, float, bool)) else fingerprint(value)[:16]


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
