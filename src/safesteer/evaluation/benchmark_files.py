"""Load a benchmark's prompts from a file below `--data-dir` or from the hub, with its schema checked."""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, overload

from safesteer.errors import SafeSteerError, one_line
from safesteer.evaluation.benchmark import Benchmark
from safesteer.evaluation.benchmark_hub import hub_rows
from safesteer.evaluation.benchmarks import benchmark_named
from safesteer.evaluation.records import EvaluationPrompt, Kind
from safesteer.prompt_files import Row, read_rows
from safesteer.prompts import load_prompts

MAX_CHARACTERS = 32_000
"""Longer prompts are left out and counted; no published prompt of the benchmarks here is half as long."""

_SENTENCE_CHARACTERS = 1000


@dataclass(frozen=True)
class Skipped:
    """How many rows were left out, by reason.

    Attributes:
        duplicates: Repeat an earlier prompt, case and white space aside.
        empty: Hold no prompt.
        overlong: Hold a prompt longer than `MAX_CHARACTERS`.
        filtered: Belong to another part of the dataset (`Benchmark.where`).
    """

    duplicates: int = 0
    empty: int = 0
    overlong: int = 0
    filtered: int = 0

    def __str__(self) -> str:
        """Tell the counts, such as "2 repeated and 1 empty"; empty if there are none."""
        words = ("repeated", "empty", "overlong", "of another part")
        told = [f"{count} {word}" for count, word in zip(astuple(self), words, strict=True) if count]
        return " and ".join([", ".join(told[:-1]), told[-1]] if len(told) > 1 else told)


@dataclass(frozen=True)
class LoadedPrompts(Sequence[EvaluationPrompt]):
    """The prompts of a benchmark, and what was left out.

    Attributes:
        prompts: In the order of the file.
        source: Where they were read from.
        skipped: What was left out of the file.
        available: How many usable prompts there were before sampling.
    """

    prompts: tuple[EvaluationPrompt, ...]
    source: str
    skipped: Skipped
    available: int

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> EvaluationPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EvaluationPrompt, ...]: ...
    def __getitem__(self, index: int | slice) -> EvaluationPrompt | tuple[EvaluationPrompt, ...]:
        """Return one prompt or a slice."""
        return self.prompts[index]

    def sample(self, limit: int | None, seed: int) -> "LoadedPrompts":
        """Sample at most `limit` prompts without replacement, in the order of the file.

        The same seed gives the same sample, and a larger limit adds to the sample of a smaller one.

        Raises:
            SafeSteerError: If the limit is below 1.
        """
        check_limit(limit)
        if limit is None or limit >= len(self):
            return self
        order = random.Random(seed).sample(range(len(self)), len(self))
        return replace(self, prompts=tuple(self.prompts[index] for index in sorted(order[:limit])))


def check_limit(limit: int | None) -> None:
    """Refuse a limit that leaves no prompt.

    Raises:
        SafeSteerError: If it is below 1.
    """
    if limit is not None and limit < 1:
        raise SafeSteerError(f"--limit {limit}: leaves no prompt; give 1 or more.")


def check_data_dir(data_dir: str | Path | None) -> None:
    """Refuse a place that does not exist.

    Raises:
        SafeSteerError: If it does not.
    """
    if data_dir is None:
        return
    with _one_sentence(f"--data-dir {data_dir}"):
        if not Path(data_dir).exists():
            raise SafeSteerError(
                f"--data-dir {data_dir}: no such folder or file; give the folder that holds the benchmarks."
            )


def load_benchmark(
    name: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> LoadedPrompts:
    """Load a benchmark.

    Args:
        name: One of `safesteer.evaluation.benchmarks.BENCHMARKS`.
        data_dir: A folder that holds the benchmark's file (`Benchmark.local_paths`, or just the file's name), or
            that file. What is not there is loaded from the hub.
        limit: Sample at most so many prompts; all by default.
        seed: Of that sample.

    Raises:
        BenchmarkUnavailable: If its file is nowhere to be had.
        SafeSteerError: If there is no such benchmark, its fields are not the documented ones, or nothing usable is
            left.
    """
    benchmark = benchmark_named(name)
    path = local_file(benchmark, data_dir)
    with _one_sentence(str(path or benchmark.hub_id or name)):
        if benchmark.package_file is not None:
            with as_file(files("safesteer.testbed") / "prompts" / benchmark.package_file) as own:
                return _checked(benchmark, read_rows(own), own.name).sample(limit, seed)
        if path is not None:
            return _checked(benchmark, read_rows(path), str(path)).sample(limit, seed)
        rows = hub_rows(benchmark, data_dir)
        return _checked(benchmark, rows, str(benchmark.hub_id)).sample(limit, seed)


def own_prompts(
    source: str | Path,
    kind: Kind,
    *,
    field: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> LoadedPrompts:
    """Load a person's own prompts (`--prompts FILE --kind harmful|harmless`).

    Args:
        source: A file or hub dataset, as `safesteer.prompts.load_prompts` reads them.
        kind: Whether they should be refused or answered.
        field: Which field holds the prompt; see `load_prompts`.
        limit: Sample at most so many prompts; all by default.
        seed: Of that sample.

    Raises:
        SafeSteerError: As `load_prompts`.
    """
    with _one_sentence(str(source)):
        found = load_prompts(source, field=field, max_characters=MAX_CHARACTERS)
        prompts = tuple(
            EvaluationPrompt(f"{index:05d}", _text(prompt, f"{source} prompt {index + 1}"), kind, category)
            for index, (prompt, category) in enumerate(zip(found.prompts, found.categories, strict=True))
        )
        skipped = Skipped(duplicates=found.duplicates, overlong=found.overlong)
        return LoadedPrompts(prompts, str(source), skipped, len(prompts)).sample(limit, seed)


def local_file(benchmark: Benchmark, data_dir: str | Path | None) -> Path | None:
    """Find a benchmark's file below `data_dir`; None if it is not there.

    Raises:
        SafeSteerError: If `data_dir` does not exist.
    """
    if data_dir is None or benchmark.package_file is not None:
        return None
    check_data_dir(data_dir)
    with _one_sentence(f"--data-dir {data_dir}"):
        folder = Path(data_dir)
        names = [Path(path).name for path in benchmark.local_paths]
        if folder.is_file():
            if folder.name in names:
                return folder
            raise SafeSteerError(
                f"--data-dir {data_dir}: is a file, but not {' or '.join(dict.fromkeys(names))}, which holds "
                f"{benchmark.name}; give that file or a folder, or give prompts of your own with --prompts."
            )
        candidates = [folder / path for path in benchmark.local_paths]
        candidates += [folder / name for name in names]
        return next((path for path in candidates if path.is_file()), None)


def _checked(benchmark: Benchmark, rows: Sequence[Row], source: str) -> LoadedPrompts:
    """Turn rows into prompts, counting what is left out."""
    if not rows:
        raise SafeSteerError(
            f"{source}: is empty; give the file of {benchmark.name} that its authors publish."
        )
    names = _Names(benchmark, rows, source)
    prompts: list[EvaluationPrompt] = []
    seen: set[str] = set()
    ids: dict[str, Row] = {}
    counts = dict.fromkeys(("duplicates", "empty", "overlong", "filtered"), 0)
    for index, row in enumerate(rows):
        place = f"{source} {row.place}"
        if not names.keeps(row, place):
            counts["filtered"] += 1
            continue
        prompt = names.prompt(row, place)
        key = " ".join(prompt.casefold().split())
        reason = (
            "empty"
            if not prompt
            else "overlong"
            if len(prompt) > MAX_CHARACTERS
            else "duplicates"
            if key in seen
            else None
        )
        if reason:
            counts[reason] += 1
            continue
        seen.add(key)
        prompt_id = names.id(row, index, place)
        if prompt_id in ids:
            raise SafeSteerError(
                f"{place}: repeats the id '{prompt_id[:40]}' of {ids[prompt_id].place}; give it another or remove "
                f"the {row.unit}."
            )
        ids[prompt_id] = row
        prompts.append(EvaluationPrompt(prompt_id, prompt, benchmark.kind, names.category(row, place)))
    skipped = Skipped(**counts)
    if not prompts:
        raise SafeSteerError(
            f"{source}: holds no usable prompt of {benchmark.name}"
            f"{f' (left out {skipped})' if str(skipped) else ''}; give the file that its authors publish."
        )
    return LoadedPrompts(tuple(prompts), source, skipped, len(prompts))


class _Names:
    """What a benchmark's fields are called in one file, and how its rows are read."""

    def __init__(self, benchmark: Benchmark, rows: Sequence[Row], source: str) -> None:
        self.benchmark = benchmark
        self.source = source
        self.found = list(dict.fromkeys(name for row in rows for name in row.fields))
        # A file of bare strings, or of strings within nested objects, has no fields to check.
        self.bare = not self.found
        self.prompt_name = None if self.bare else self._find(benchmark.prompt_field, required=True)
        self.context_name = self._find(benchmark.context_field, required=True)
        self.category_name = self._find(benchmark.category_field, required=False)
        self.id_name = self._find(benchmark.id_field, required=False)
        where = benchmark.where
        filters = (
            [] if where is None else [self._find(name, required=where.required) for name in where.fields]
        )
        self.filters = [name for name in filters if name is not None] if None not in filters else []

    def keeps(self, row: Row, place: str) -> bool:
        where = self.benchmark.where
        if where is None or not self.filters:
            return True
        values = [self._value(row, name, place) for name in self.filters]
        return where.keeps(*(v.strip().casefold() if isinstance(v, str) else v for v in values))

    def prompt(self, row: Row, place: str) -> str:
        """Return the prompt, stripped; empty if there is none."""
        if self.prompt_name is None:
            if row.text is None:
                raise SafeSteerError(f"{place}: is not a string like the others; make every one a string.")
            return _text(row.text, place).strip()
        prompt = self._string(row, self.prompt_name, place)
        if self.benchmark.wrapping:
            start, end = self.benchmark.wrapping
            prompt = prompt.removeprefix(start).removesuffix(end).strip()
        if self.context_name and prompt:
            context = self._string(row, self.context_name, place)
            # HarmBench's format of a contextual behavior (arXiv 2402.04249).
            prompt = f"{context}\n\n---\n\n{prompt}" if context else prompt
        return prompt

    def category(self, row: Row, place: str) -> str | None:
        if self.category_name is None:
            return None if row.category is None else _text(row.category, place).split(" / ")[0]
        return self._label(row, self.category_name, place) or None

    def id(self, row: Row, index: int, place: str) -> str:
        given = self._label(row, self.id_name, place) if self.id_name is not None else ""
        return given or f"{index:05d}"

    def _find(self, name: str | None, *, required: bool) -> str | None:
        """Return what this file calls the field; None if it has none."""
        if name is None:
            return None
        names = self.benchmark.names_of(name)
        wanted = [known.casefold() for known in names]
        found = [known for known in self.found if known.casefold() in wanted]
        # On the hub and in the authors' file a field has one name each; the hub's goes first where both are there.
        found.sort(key=lambda known: wanted.index(known.casefold()))
        if not found and required and not self.bare:
            raise SafeSteerError(
                f"{self.source}: field {' or '.join(map(repr, names))} of {self.benchmark.name} is missing (it has: "
                f"{_shown(self.found)}); give the file that its authors publish."
            )
        if not found and required:
            raise SafeSteerError(
                f"{self.source}: holds bare strings where {self.benchmark.name} needs the field '{name}'; give the "
                "file that its authors publish."
            )
        return found[0] if found else None

    def _value(self, row: Row, name: str, place: str) -> Any:
        if name not in row.fields:
            raise SafeSteerError(
                f"{place}: field '{name}' is missing (it has: {_shown(row.fields)}); restore or remove the {row.unit}."
            )
        return row.fields[name]

    def _string(self, row: Row, name: str, place: str) -> str:
        """Return a field's text, stripped; empty if there is none. Of a list of turns, its only one."""
        value = self._value(row, name, place)
        if isinstance(value, list | tuple):
            turns = [turn for turn in value if turn is not None]
            if len(turns) > 1:
                raise SafeSteerError(
                    f"{place}: field '{name}' holds {len(turns)} turns; only prompts of one turn can be evaluated, "
                    f"remove the {row.unit}."
                )
            value = turns[0] if turns else None
        if value is None:
            return ""
        if not isinstance(value, str):
            raise SafeSteerError(
                f"{place}: field '{name}' holds a {type(value).__name__}, not text; restore or remove the {row.unit}."
            )
        return _text(value, place).strip()

    def _label(self, row: Row, name: str, place: str) -> str:
        """Return an id or a category: text or a whole number."""
        value = self._value(row, name, place)
        if type(value) is int:
            return str(value)
        return self._string(row, name, place)


def _text(value: str, place: str) -> str:
    """Return a text that can be written as UTF-8.

    Raises:
        SafeSteerError: If it holds half a surrogate pair, which JSON can escape but no tokenizer takes.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SafeSteerError(
            f"{place}: holds half a surrogate pair (a broken emoji, say), so it is not text; mend or remove it."
        ) from None
    return value


def _shown(fields: Sequence[str] | Mapping[str, object]) -> str:
    """List fields for a sentence: twelve at most, long names cut."""
    names = [name if len(name) <= 40 else name[:39] + "…" for name in fields if name]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") or "none"


@contextlib.contextmanager
def _one_sentence(source: str) -> Iterator[None]:
    """Whatever a file does to its reader becomes one printable sentence."""
    try:
        yield
    except SafeSteerError as error:
        # Of the same kind: a benchmark that cannot be had is not one that is broken.
        raise type(error)(_printable(str(error))) from error
    except RecursionError:
        raise SafeSteerError(_printable(f"{source}: is nested too deeply; give a list of prompts.")) from None
    # Numbers of more than 4,300 digits, names that are too long for the file system, dates out of range.
    except (ValueError, OSError, OverflowError) as error:
        raise SafeSteerError(
            _printable(f"{source}: cannot be read ({one_line(error)}); check the file.")
        ) from error


def _printable(sentence: str) -> str:
    """Fold white space and escape what a terminal cannot show; field names of a broken file may hold anything."""
    encoded = " ".join(sentence.split()).encode("utf-8", "backslashreplace").decode()
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in encoded)
    if len(shown) <= _SENTENCE_CHARACTERS:
        return shown
    half = _SENTENCE_CHARACTERS // 2
    return f"{shown[:half]} … {shown[-half:]}"
