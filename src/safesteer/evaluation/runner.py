"""Ask every model every prompt once, judge the responses as often as wanted, and sum up.

The record files are the truth. A process may be killed at any moment: the same call continues, generates only what
is missing, and ends in the same records as if it had not been killed.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from safesteer.artifacts import fingerprint, write_json
from safesteer.chat import Chat
from safesteer.console import ProgressCallback
from safesteer.environment import describe_environment
from safesteer.errors import SafeSteerError
from safesteer.evaluation.benchmark_files import LoadedPrompts
from safesteer.evaluation.extras import is_installed
from safesteer.evaluation.generation import Decoding, generate_records, that_fit
from safesteer.evaluation.inspect_logs import write_log
from safesteer.evaluation.judges import DEFAULT_JUDGES, Judge, JudgeInterrupted, load_judge
from safesteer.evaluation.records import EvaluationPrompt, Record, RecordFile, Verdict, ids_of
from safesteer.evaluation.served import generate_served_records
from safesteer.evaluation.subjects import AnySubject, ServedSubject, Subject, slug
from safesteer.evaluation.summary import EvaluationSummary, Judged, summarize
from safesteer.evaluation.variants import load_variants

Prompts = Mapping[str, Sequence[EvaluationPrompt]]
"""Benchmark to prompts."""

# What a judge loses at most when the process is killed.
_JUDGED_AT_A_TIME = 256


def evaluate(
    subjects: Sequence[AnySubject],
    benchmarks: Sequence[str] | Prompts,
    judges: Sequence[Judge | str] = DEFAULT_JUDGES,
    output: str | Path = "evaluation",
    *,
    data_dir: str | Path | None = None,
    templates: str | Path = "gptfuzzer",
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    batch_size: int = 32,
    logs: bool = True,
    progress: ProgressCallback | None = None,
) -> EvaluationSummary:
    """Evaluate models on safety and over-refusal benchmarks.

    Args:
        subjects: The models (see `subjects_of`); all get the same prompts. Changes are told since the one called
            "base", or the first.
        benchmarks: Names, perhaps with variants (see `load_variant`); or name to prompts.
        judges: Judges, or what `load_judge` takes.
        output: The folder of records, verdicts, summaries and Inspect logs. What it holds of the same evaluation is
            not done again.
        data_dir: Where benchmarks are looked for before the hub.
        templates: Of the variants (see `load_templates`).
        limit: Sample at most so many prompts per benchmark.
        seed: Of samples of prompts, templates and tokens.
        max_new_tokens: Longest response.
        temperature: 0 is greedy.
        batch_size: Prompts at a time; requests at a time to a served model.
        logs: Write Inspect logs to `output/logs`, if Inspect is installed.
        progress: Told what is being done.

    Returns:
        Every figure, which `summary.json`, `summary.csv` and `summary.md` in `output` hold too.

    Raises:
        SafeSteerError: If a model, benchmark or judge cannot be had, `output` is of another evaluation or in use, or
            a server is gone (what was done is kept).
    """
    if len({subject.name for subject in subjects}) < len(subjects) or not subjects:
        raise SafeSteerError("the models to evaluate have no names of their own; give each another name.")
    decoding = Decoding(max_new_tokens, temperature, seed, batch_size)
    panel = [load_judge(judge) if isinstance(judge, str) else judge for judge in judges]
    repeated = [judge.name for judge in panel if sum(other.name == judge.name for other in panel) > 1]
    if repeated:
        raise SafeSteerError(f"--judge {repeated[0]}: is given twice; give every judge once.")
    loaded, notes = _prompts(subjects, benchmarks, data_dir, templates, limit, decoding)
    folder = Path(output)
    with _only_writer(folder):
        for judge in panel:
            judge.prepare()
            judge.release()  # the memory is the models' until they have answered
        _generate(subjects, loaded, decoding, folder, progress)
        judged: dict[str, Judged] = {}
        with _moved_aside(subjects):
            verdicts = _judge(subjects, loaded, panel, folder, decoding, progress)
        for subject in subjects:
            judged[subject.name] = {
                name: (_records(subject, name, prompts, decoding, folder), verdicts[subject.name, name])
                for name, prompts in loaded.items()
            }
        if logs and is_installed("inspect_ai"):
            _write_logs(subjects, judged, decoding, folder, progress)
        settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "limit": limit,
            "batch_size": batch_size,
            "benchmarks": {name: len(prompts) for name, prompts in loaded.items()},
            "judges": [judge.name for judge in panel],
            "models": {subject.name: subject.identity[:12] for subject in subjects},
        }
        summary = summarize(judged, settings=settings, notes=notes)
        summary.write(folder)
        write_json(folder / "environment.json", describe_environment(seed))
    return summary


def _prompts(
    subjects: Sequence[AnySubject],
    benchmarks: Sequence[str] | Prompts,
    data_dir: str | Path | None,
    templates: str | Path,
    limit: int | None,
    decoding: Decoding,
) -> tuple[Prompts, list[str]]:
    """Load all prompts before anything is generated; the same for every model."""
    local = [subject for subject in subjects if isinstance(subject, Subject)]
    tokenizer = local[0].chat.tokenizer if local and len(local) == len(subjects) else None
    given: Prompts
    if isinstance(benchmarks, Mapping):
        given = benchmarks
    else:
        given, _ = load_variants(
            benchmarks,
            data_dir=data_dir,
            limit=limit,
            seed=decoding.seed,
            tokenizer=tokenizer,
            templates=templates,
        )
    loaded: dict[str, Sequence[EvaluationPrompt]] = {}
    notes: list[str] = []
    for name, prompts in given.items():
        ids_of(prompts)
        kept = tuple(prompts)
        # Models of one run have one tokenizer and one context.
        for subject in {id(subject.model.config): subject for subject in local}.values():
            kept = that_fit(subject, kept, decoding.max_new_tokens)
        if isinstance(prompts, LoadedPrompts) and str(prompts.skipped):
            notes.append(f"{name}: left out of {prompts.source}: {prompts.skipped}.")
        if len(kept) < len(prompts):
            notes.append(
                f"{name}: {len(prompts) - len(kept)} prompts were left out, because the model's context does not hold "
                f"them and {decoding.max_new_tokens} tokens of answer."
            )
        loaded[name] = kept
    return loaded, notes


def _generate(
    subjects: Sequence[AnySubject],
    loaded: Prompts,
    decoding: Decoding,
    folder: Path,
    progress: ProgressCallback | None,
) -> None:
    for subject in subjects:
        for name, prompts in loaded.items():
            file = _response_file(subject, name, prompts, decoding, folder)
            if isinstance(subject, ServedSubject):
                generate_served_records(subject, name, prompts, decoding, file, progress)
            else:
                generate_records(subject, name, prompts, decoding, file, progress)


def _judge(
    subjects: Sequence[AnySubject],
    loaded: Prompts,
    judges: Sequence[Judge],
    folder: Path,
    decoding: Decoding,
    progress: ProgressCallback | None,
) -> dict[tuple[str, str], dict[str, dict[str, Verdict]]]:
    """Return verdicts by subject and benchmark, then judge, then id."""
    verdicts: dict[tuple[str, str], dict[str, dict[str, Verdict]]] = {}
    # One judge after the other: two classifiers of 12 billion parameters do not share a GPU.
    for judge in judges:
        for subject in subjects:
            for name, prompts in loaded.items():
                records = _records(subject, name, prompts, decoding, folder)
                found = _verdicts(judge, records, folder / subject.name / name, progress)
                verdicts.setdefault((subject.name, name), {})[judge.name] = found
        judge.release()
    for subject in subjects:
        for name in loaded:
            verdicts.setdefault((subject.name, name), {})
    return verdicts


def _verdicts(
    judge: Judge, records: Sequence[Record], folder: Path, progress: ProgressCallback | None
) -> dict[str, Verdict]:
    """Have a judge say what it has not said yet."""
    answers = fingerprint([[record.id, record.prompt, record.prefill, record.answer] for record in records])
    file = RecordFile(
        folder / f"verdicts-{slug(judge.name)}.jsonl", Verdict, {**judge.identity, "answers": answers}
    )
    found = file.load()
    missing = [record for record in records if record.id not in found]
    for start in range(0, len(missing), _JUDGED_AT_A_TIME):
        part = missing[start : start + _JUDGED_AT_A_TIME]
        try:
            verdicts = judge.judge(part)
        except JudgeInterrupted as error:
            file.append(list(error.verdicts))
            raise
        if [verdict.id for verdict in verdicts] != [record.id for record in part]:
            raise SafeSteerError(
                f"judge {judge.name}: returned {len(verdicts)} verdicts that are not of the {len(part)} records it was "
                "given; return one per record, in their order."
            )
        file.append(verdicts)
        found.update((verdict.id, verdict) for verdict in verdicts)
        if progress is not None:
            progress(f"{judge.name} judges {folder.parent.name} on {folder.name}", len(found), len(records))
    return found


def _records(
    subject: AnySubject, name: str, prompts: Sequence[EvaluationPrompt], decoding: Decoding, folder: Path
) -> list[Record]:
    """Read the responses in the order of the prompts."""
    found = _response_file(subject, name, prompts, decoding, folder).load()
    return [found[prompt.id] for prompt in prompts]


def _response_file(
    subject: AnySubject, name: str, prompts: Sequence[EvaluationPrompt], decoding: Decoding, folder: Path
) -> RecordFile[Record]:
    identity = {
        "max_new_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed if decoding.temperature > 0 else None,
        "number of prompts": len(prompts),
        "prompts": list(prompts),
        "model": subject.identity,
        "chat": _chat_fingerprint(subject.chat) if isinstance(subject, Subject) else None,
    }
    return RecordFile(folder / subject.name / name / "responses.jsonl", Record, identity)


_CHAT_FINGERPRINTS: dict[int, tuple[Chat, str]] = {}


def _chat_fingerprint(chat: Chat) -> str:
    """Hash a chat once: it goes through the whole vocabulary."""
    known = _CHAT_FINGERPRINTS.get(id(chat))
    if known is None or known[0] is not chat:
        known = _CHAT_FINGERPRINTS[id(chat)] = (chat, chat.fingerprint)
    return known[1]


def _write_logs(
    subjects: Sequence[AnySubject],
    judged: Mapping[str, Judged],
    decoding: Decoding,
    folder: Path,
    progress: ProgressCallback | None,
) -> None:
    total = sum(len(found) for found in judged.values())
    done = 0
    for subject in subjects:
        model = subject.model if isinstance(subject, ServedSubject) else f"safesteer/{subject.name}"
        for name, (records, verdicts) in judged[subject.name].items():
            write_log(folder / "logs", subject.name, model, name, records, verdicts, decoding)
            done += 1
            if progress is not None:
                progress("writing Inspect logs", done, total)


@contextlib.contextmanager
def _moved_aside(subjects: Sequence[AnySubject]) -> Iterator[None]:
    """Move models off the GPU, which the judges need now, and back."""
    models = {
        id(subject.model): subject.model
        for subject in subjects
        if isinstance(subject, Subject) and subject.model.device.type == "cuda"
    }
    devices = {name: model.device for name, model in models.items()}
    for model in models.values():
        model.to("cpu")  # type: ignore[arg-type]  # transformers decorates it in a way mypy misreads
    if models:
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for name, model in models.items():
            model.to(devices[name])  # type: ignore[arg-type]


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Keep a second evaluation out of a folder; the lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SafeSteerError(
                f"{folder}: another evaluation is writing there; wait for it or choose another --output."
            ) from None
        yield
