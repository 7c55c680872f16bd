"""What a model can do: capability benchmarks, asked and scored by lm-eval.

This module chooses the settings, hands lm-eval a model that is already in memory (with its adapter, or steered), and
reads the scores out of what comes back. Everything that decides a score is lm-eval's (see `capability_tasks`). The same
settings, questions and batches go to every model that is compared:

- Generative tasks are asked through the model's chat template, examples as turns of the conversation. MMLU is not: the
  likelihood of a letter after "Answer:" is its authors' setting, and few chat models keep to it inside their template.
- Decoding is greedy, as lm-eval's definitions say.
- `limit` draws questions at random, the same ones for the same seed; lm-eval's own limit takes the first.
"""

import importlib.metadata
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safesteer.artifacts import fingerprint, read_json, write_json
from safesteer.errors import SafeSteerError, one_line
from safesteer.evaluation.capability_tasks import CAPABILITY_TASKS, CapabilityTask
from safesteer.evaluation.capability_tasks.host import (
    AnswerCounter,
    language_model,
    quiet,
    random_states_kept,
)
from safesteer.evaluation.statistics import Difference, paired_bootstrap, wilson_interval
from safesteer.next_token import Progress, evaluating, no_progress

if TYPE_CHECKING:
    from safesteer.evaluation.subjects import Subject

DEFAULT_TASKS = ("mmlu_stem", "gsm8k", "math500", "humaneval")
"""The tasks of the paper."""

# Every question of MMLU has so many, and each one's likelihood is asked for.
_CHOICES = 4
# lm-eval's default: which examples a question is shown. It is not the seed of the choice of questions.
_FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Score:
    """How well a model did at one capability task.

    Attributes:
        task: The task's name.
        value: Share of questions answered right, 0 to 1: the metric that is reported first.
        stderr: lm-eval's standard error of it; NaN for a single question.
        low: Lower end of the 95 % Wilson interval, 0 to 1.
        high: Upper end.
        metric: Which metric, as lm-eval names it: "metric,filter".
        n: How many questions were asked.
        truncated: How many prompts were too long for the model and lost their beginning.
        others: lm-eval's other metrics of the task, as they are.
        subtasks: The first metric by subtask (MMLU's subjects, the testbed's skills).
        notes: What a reader should know.
        outcomes: The first metric of every question, by "subtask/number of the question"; for paired comparisons.
    """

    task: str
    value: float
    stderr: float
    low: float
    high: float
    metric: str
    n: int
    truncated: int
    others: Mapping[str, float]
    subtasks: Mapping[str, float]
    notes: str
    outcomes: Mapping[str, float] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Return the figures for a summary: everything but the outcomes."""
        return {name: value for name, value in asdict(self).items() if name != "outcomes"}


def run_capability(
    subject: "Subject",
    tasks: Sequence[str] = DEFAULT_TASKS,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    allow_code_execution: bool = False,
    seed: int = 0,
    output: str | Path | None = None,
    progress: Progress = no_progress,
) -> dict[str, Score]:
    """Measure what a model can do.

    Args:
        subject: The model, with its chat template and whatever steers it.
        tasks: Names of `CAPABILITY_TASKS`.
        data_dir: The folder of benchmark data; None loads from the hub.
        limit: Most questions per task (spread over MMLU's subjects); None asks all.
        batch_size: Prompts at a time.
        allow_code_execution: Run the programs that the model writes for HumanEval (see
            `capability_tasks.programs`).
        seed: Of the choice of questions.
        output: A folder for every question, answer and score, of this model alone: one file `TASK.json` per
            task. A task that is there already, made with the same settings, is not done again.
        progress: Called as a task gets on.

    Returns:
        Scores by task, in the order of `tasks`.

    Raises:
        SafeSteerError: If a task is unknown, would run code without leave, lacks a package or its data.
    """
    chosen = tasks_named(tasks, allow_code_execution=allow_code_execution)
    if limit is not None and limit < 1:
        raise SafeSteerError(f"a limit of {limit} asks nothing; give a positive number of questions.")
    folder = None if data_dir is None else Path(data_dir)
    scores: dict[str, Score] = {}
    for task in chosen:
        kept = None if output is None else Path(output) / f"{task.name}.json"
        made_with = _made_with(task, subject, folder, limit, batch_size, seed)
        score = None if kept is None else _kept(kept, made_with)
        if score is None:
            with quiet(), random_states_kept(), subject.steering(), evaluating(subject.model, seed):
                score, questions = _run(task, subject, folder, limit, batch_size, seed, progress)
            if kept is not None:
                write_json(kept, {"made_with": made_with, "score": score, "questions": questions})
        scores[task.name] = score
    return scores


def capability_changes(
    before: Mapping[str, Score], after: Mapping[str, Score], *, seed: int = 0
) -> dict[str, Difference]:
    """Estimate, for every task both models did, the change of the score over the questions both were asked.

    Returns:
        Task to the difference in percentage points, with the interval of `paired_bootstrap`.
    """
    changes = {}
    for name in before.keys() & after.keys():
        one, other = before[name].outcomes, after[name].outcomes
        common = [question for question in one if question in other]
        changes[name] = paired_bootstrap(
            [one[question] > 0 for question in common],
            [other[question] > 0 for question in common],
            seed=seed,
        )
    return {name: changes[name] for name in before if name in changes}


def _made_with(
    task: CapabilityTask,
    subject: "Subject",
    data_dir: Path | None,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> str:
    """Fingerprint everything that a score depends on."""
    return fingerprint(
        {
            "task": task,
            "model": subject.identity,
            "chat": subject.chat.fingerprint,
            "data_dir": data_dir,
            "limit": limit,
            "batch_size": batch_size,
            "seed": seed,
            "lm_eval": _version("lm-eval"),
        }
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _kept(path: Path, made_with: str) -> Score | None:
    """Return the score an earlier run left, if it was made with the same; None if the task must be done."""
    if not path.is_file():
        return None
    found = read_json(path)
    if found.get("made_with") != made_with or not isinstance(found.get("score"), dict):
        return None
    values = found["score"]
    return Score(**{**values, "stderr": math.nan if values["stderr"] is None else values["stderr"]})


def tasks_named(names: Sequence[str], *, allow_code_execution: bool) -> list[CapabilityTask]:
    """Look up tasks, each once, in the order they are named.

    Raises:
        SafeSteerError: If there is no such task, or it would run code without leave.
    """
    for name in names:
        if name not in CAPABILITY_TASKS:
            raise SafeSteerError(
                f"{name!r} is no capability task; choose from: {', '.join(CAPABILITY_TASKS)}."
            )
    tasks = [CAPABILITY_TASKS[name] for name in dict.fromkeys(names)]
    for task in tasks:
        if task.runs_code and not allow_code_execution:
            raise SafeSteerError(
                f"{task.name} runs programs that the model writes; say so with --allow-code-execution, or leave "
                "the task out."
            )
    return tasks


def _run(
    task: CapabilityTask,
    subject: "Subject",
    data_dir: Path | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> tuple[Score, list[dict[str, Any]]]:
    # It looks for lm-eval before anything imports it.
    from safesteer.evaluation.capability_tasks.definitions import build_task, leaves_of

    model = language_model(subject.model, subject.chat, task, batch_size)
    # At least half of what the model can read is left for the question.
    max_tokens = model.max_length // 2
    built = build_task(task, data_dir, max_tokens=max_tokens)
    leaves = leaves_of(built)
    questions = chosen_questions({name: len(leaf.eval_docs) for name, leaf in leaves.items()}, limit, seed)
    for name in leaves.keys() - questions.keys():
        built.pop(name)
    answers = sum(map(len, questions.values())) * (1 if task.generative else _CHOICES)
    model.set_cache_hook(AnswerCounter(progress, f"{task.title}, {subject.name}", answers))

    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    for leaf in leaves_of(built).values():
        # As lm-eval's simple_evaluate does, which also asks pip for every package installed.
        if leaf.get_config("num_fewshot") is None:
            leaf.set_config("num_fewshot", 0)
        leaf.set_fewshot_seed(_FEWSHOT_SEED)
    try:
        results = evaluate(
            lm=model,
            task_dict=TaskManager(include_defaults=False).load([built]),
            samples=questions,
            apply_chat_template=task.generative,
            fewshot_as_multiturn=task.generative,
            system_instruction=subject.chat.system_prompt if task.generative else None,
            confirm_run_unsafe_code=task.runs_code,
        )
    except LookupError as error:
        if task.extra != "ifeval":
            raise
        raise SafeSteerError(
            f"{task.title} needs nltk's sentence splitter ({one_line(error, 80)}); run python -m nltk.downloader "
            "punkt_tab once."
        ) from error
    room = model.max_length - (max_tokens if task.generative else 1)
    return _score(task, results, questions, lambda prompt: len(model.tok_encode(prompt)) > room)


def chosen_questions(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Draw at most `limit` questions at random, spread evenly over subtasks; the same for the same seed.

    Args:
        sizes: Subtask to how many questions it has.
        limit: Most questions of all subtasks together; None takes all.
        seed: Of the draw.

    Returns:
        Subtask to the numbers of its questions in ascending order; a subtask without any is left out.
    """
    shares = dict(sizes)
    if limit is not None and limit < sum(sizes.values()):
        shares = dict.fromkeys(sizes, 0)
        while sum(shares.values()) < limit:
            open_ones = [name for name in sizes if shares[name] < sizes[name]]
            for name in open_ones[: limit - sum(shares.values())]:
                shares[name] += 1
    return {
        name: sorted(random.Random(f"{seed}/{name}").sample(range(sizes[name]), share))
        for name, share in shares.items()
        if share
    }


def _score(
    task: CapabilityTask,
    results: Any,
    questions: Mapping[str, Sequence[int]],
    too_long: Callable[[str], bool],
) -> tuple[Score, list[dict[str, Any]]]:
    """Read a task's score, and its questions with the answers, out of lm-eval's results."""
    metric, _, first_filter = task.metric.partition(",")
    asked = [
        {
            "question": f"{name}/{sample['doc_id']}",
            "prompt": sample["arguments"][0][0],
            "target": str(sample["target"]),
            "responses": sample["resps"],
            "extracted": sample["filtered_resps"],
            "score": float(sample[metric]),
        }
        for name in questions
        for sample in results["samples"][name]
        if sample["filter"] == first_filter
    ]
    figures = results["results"][task.name if task.name in results["results"] else next(iter(questions))]
    truncated = sum(too_long(entry["prompt"]) for entry in asked)
    notes = [task.notes]
    if task.name == "mmlu_stem" and "mmlu_anatomy" not in questions:
        notes.append("without anatomy, which lm-eval adds to the authors' 18 subjects")
    if truncated:
        notes.append(
            f"{truncated} of {len(asked)} prompts lost their beginning, being longer than the model reads"
        )
    low, high = wilson_interval(sum(entry["score"] > 0 for entry in asked), len(asked))
    score = Score(
        task=task.name,
        value=float(figures[task.metric]),
        stderr=_number(figures.get(f"{metric}_stderr,{first_filter}")),
        low=low,
        high=high,
        metric=task.metric,
        n=len(asked),
        truncated=truncated,
        others={
            name: float(value)
            for name, value in figures.items()
            if "," in name and "_stderr," not in name and name != task.metric and _is_number(value)
        },
        subtasks={
            name: float(results["results"][name][task.metric]) for name in questions if len(questions) > 1
        },
        notes="; ".join(notes),
        outcomes={entry["question"]: entry["score"] for entry in asked},
    )
    return score, asked


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number))


def _number(value: Any) -> float:
    """Read one of lm-eval's figures, which are "N/A" where there are none."""
    return float(value) if _is_number(value) else math.nan
