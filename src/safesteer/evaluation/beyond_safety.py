"""Capability and distributional tax of the models of an evaluation, added to its summary."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safesteer.console import ProgressCallback
from safesteer.errors import SafeSteerError
from safesteer.evaluation.alpaca_eval import ALPACA_EVAL, alpaca_eval, load_judge_prompt, load_questions
from safesteer.evaluation.benchmark_files import load_benchmark
from safesteer.evaluation.capability import Score, capability_changes, run_capability, tasks_named
from safesteer.evaluation.capability_tasks import CAPABILITY_TASKS
from safesteer.evaluation.extras import require_extra
from safesteer.evaluation.pairwise_judge import PairwiseJudge, load_pairwise_judge
from safesteer.evaluation.statistics import Difference, sentence
from safesteer.evaluation.subjects import AnySubject, Subject
from safesteer.evaluation.summary import REFERENCE, Change, EvaluationSummary
from safesteer.evaluation.tax import distributional_tax
from safesteer.evaluation.win_rates import AlpacaEvalScore, length_controlled_change
from safesteer.next_token import no_progress

TAX_BENCHMARK = "testbed-harmless"
"""The project's own harmless requests, which come with the package."""

CAPABILITY_NAMES = (*CAPABILITY_TASKS, ALPACA_EVAL)
"""What `--capability` takes: lm-eval's tasks and AlpacaEval 2."""

_TAX_PROMPTS = 128
_LONGEST_ANSWER = 2048


def with_capability(
    summary: EvaluationSummary,
    subjects: Sequence[AnySubject],
    tasks: Sequence[str],
    output: str | Path,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    allow_code_execution: bool = False,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> EvaluationSummary:
    """Measure every model's capability under the same settings, and its change since the first or "base".

    Args:
        summary: To be added to.
        subjects: The models.
        tasks: As for `run_capability`.
        output: The evaluation's folder; questions and answers go to `SUBJECT/capability`.
        data_dir: As for `run_capability`.
        limit: As for `run_capability`.
        batch_size: As for `run_capability`.
        allow_code_execution: As for `run_capability`.
        seed: As for `run_capability`.
        progress: Told what is being done.

    Raises:
        SafeSteerError: As `run_capability`; or if a model is served.
    """
    local = _local(subjects, "--capability")
    scores: dict[str, dict[str, Score]] = {}
    for subject in local:
        scores[subject.name] = run_capability(
            subject,
            tasks,
            data_dir=data_dir,
            limit=limit,
            batch_size=batch_size,
            allow_code_execution=allow_code_execution,
            seed=seed,
            output=Path(output) / subject.name / "capability",
            progress=progress or no_progress,
        )
    reference = _reference(local)
    changes = [
        _change(subject, reference, task, "lm-eval", difference)
        for subject in local
        if subject is not reference
        for task, difference in capability_changes(
            scores[reference.name], scores[subject.name], seed=seed
        ).items()
    ]
    return _with_scores(summary, scores, changes)


def with_alpaca_eval(
    summary: EvaluationSummary,
    subjects: Sequence[AnySubject],
    judge: PairwiseJudge,
    output: str | Path,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> EvaluationSummary:
    """Measure every model's length-controlled win rate on AlpacaEval 2, and its change since the first or "base".

    Answers have at most 2,048 tokens, the leaderboard's limit, or half of what the model can read.

    Args:
        summary: To be added to.
        subjects: The models.
        judge: Who compares.
        output: The evaluation's folder; answers and verdicts go to `SUBJECT/capability/alpaca_eval`.
        data_dir: As for `alpaca_eval`.
        limit: As for `alpaca_eval`.
        batch_size: As for `alpaca_eval`.
        seed: As for `alpaca_eval`.
        progress: Told what is being done.

    Raises:
        SafeSteerError: As `alpaca_eval`; or if a model is served.
    """
    local = _local(subjects, f"--capability {ALPACA_EVAL}")
    found = {
        subject.name: alpaca_eval(
            subject,
            judge,
            Path(output) / subject.name / "capability" / ALPACA_EVAL,
            data_dir=data_dir,
            limit=limit,
            max_new_tokens=_answer_tokens(subject),
            batch_size=batch_size,
            seed=seed,
            progress=progress or no_progress,
        )
        for subject in local
    }
    _, difficulty = load_questions(data_dir)
    reference = _reference(local)
    before = found[reference.name].comparisons
    changes = []
    for subject in local:
        if subject is not reference:
            after = found[subject.name].comparisons
            difference = length_controlled_change(before, after, difficulty, seed=seed)
            changes.append(_change(subject, reference, ALPACA_EVAL, judge.where, difference))
    scores = {name: {ALPACA_EVAL: _as_score(score)} for name, score in found.items()}
    return _with_scores(summary, scores, changes)


def with_tax(
    summary: EvaluationSummary,
    subjects: Sequence[AnySubject],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> EvaluationSummary:
    """Measure how far every model moved from the base model on the project's harmless requests.

    Args:
        summary: To be added to.
        subjects: The models; at least two.
        limit: Most prompts; 128 by default.
        batch_size: Prompts at a time.
        seed: Of the sample of prompts and of the bootstrap.
        progress: Told what is being done.

    Raises:
        SafeSteerError: If there is nothing to compare, or a model is served.
    """
    local = check_tax(subjects)
    reference = _reference(local)
    others = [subject for subject in local if subject is not reference]
    prompts = [
        prompt.prompt for prompt in load_benchmark(TAX_BENCHMARK, limit=limit or _TAX_PROMPTS, seed=seed)
    ]
    tax = {
        subject.name: distributional_tax(
            reference, subject, prompts, batch_size=batch_size, seed=seed, progress=progress or no_progress
        ).record()
        for subject in others
    }
    return replace(summary, tax=tax)


def check_capability(
    names: Sequence[str], *, allow_code_execution: bool = False, alpaca_judge: str | None = None
) -> None:
    """Find out before anything is loaded whether capability can be asked for like this.

    Args:
        names: Of `CAPABILITY_NAMES`.
        allow_code_execution: Whether programs that a model writes may be run.
        alpaca_judge: AlpacaEval's judge, "MODEL@URL".

    Raises:
        SafeSteerError: If a task is unknown, would run code without leave, lacks its judge, or lm-eval is not
            installed.
    """
    for name in names:
        if name not in CAPABILITY_NAMES:
            raise SafeSteerError(
                f"--capability {name}: there is none; choose among {', '.join(CAPABILITY_NAMES)}."
            )
    of_lm_eval = [name for name in names if name != ALPACA_EVAL]
    tasks_named(of_lm_eval, allow_code_execution=allow_code_execution)
    if of_lm_eval:
        require_extra("lm_eval", f"--capability {of_lm_eval[0]}")
    if alpaca_judge is not None and ALPACA_EVAL not in names:
        raise SafeSteerError(
            f"--alpaca-judge {alpaca_judge}: is for AlpacaEval; give --capability {ALPACA_EVAL} too."
        )
    if ALPACA_EVAL in names:
        if alpaca_judge is None:
            raise SafeSteerError(
                f"--capability {ALPACA_EVAL}: needs a chat model on a server that compares answers; give --alpaca-judge "
                "MODEL@URL, such as gpt-4-1106-preview@https://api.openai.com/v1."
            )
        load_pairwise_judge(alpaca_judge)


def ready_alpaca_judge(spec: str, data_dir: str | Path | None) -> PairwiseJudge:
    """Find out before hours are spent on other things whether AlpacaEval's data and judge are there.

    Args:
        spec: "MODEL@URL".
        data_dir: The folder of benchmark data; AlpacaEval's own judge prompt is used where it lies there.

    Raises:
        SafeSteerError: If the data or the judge cannot be had.
    """
    load_questions(data_dir)
    judge = load_pairwise_judge(spec, prompt=load_judge_prompt(data_dir))
    judge.prepare()
    return judge


def check_local(subjects: Sequence[AnySubject], names: Sequence[str]) -> None:
    """Find out whether capability can be measured of these models.

    Raises:
        SafeSteerError: If one of them is served.
    """
    if names:
        _local(subjects, "--capability")


def check_tax(subjects: Sequence[AnySubject]) -> list[Subject]:
    """Find out whether there are two models to compare, and return the models.

    Raises:
        SafeSteerError: If there are not, or a model is served.
    """
    local = _local(subjects, "--tax")
    if len(local) < 2:
        raise SafeSteerError("--tax: compares models with the base model, and there is only one; name a run.")
    return local


def _with_scores(
    summary: EvaluationSummary, scores: Mapping[str, Mapping[str, Score]], changes: Sequence[Change]
) -> EvaluationSummary:
    """Add scores, by model and task, and changes to those that are there."""
    capability = {
        name: {
            **summary.capability.get(name, {}),
            **{task: score.record() for task, score in scores.get(name, {}).items()},
        }
        for name in {**summary.capability, **scores}
    }
    return replace(summary, capability=capability, changes=(*summary.changes, *changes))


def _change(subject: Subject, reference: Subject, task: str, judge: str, difference: Difference) -> Change:
    wins = task == ALPACA_EVAL
    what = f"length-controlled wins of {task} ({judge})" if wins else f"right answers to {task}"
    return Change(
        subject=subject.name,
        against=reference.name,
        benchmark=task,
        judge=judge,
        measure="preferred" if wins else "correct",
        difference=difference,
        sentence=sentence(what, difference, higher_is="better", concern="lost capability"),
    )


def _as_score(found: AlpacaEvalScore) -> Score:
    """Give AlpacaEval's result the shape of the other tasks'; the shares are 0 to 1 there."""
    return Score(
        task=ALPACA_EVAL,
        value=found.length_controlled / 100,
        stderr=math.nan,
        low=found.length_controlled_low / 100,
        high=found.length_controlled_high / 100,
        metric="length_controlled_win_rate",
        n=found.n,
        truncated=0,
        others={
            "win_rate": found.win_rate / 100,
            "win_rate_low": found.win_rate_low / 100,
            "win_rate_high": found.win_rate_high / 100,
            "length_effect": found.length_effect,
            "mean_length": found.mean_length,
            "mean_reference_length": found.mean_reference_length,
            "unparsed": found.unparsed,
        },
        subtasks={},
        notes=f"against GPT-4 Turbo, judged by {found.judge}; {found.notes}",
        outcomes={},
    )


def _answer_tokens(subject: Subject) -> int:
    context = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    return min(_LONGEST_ANSWER, context // 2) if isinstance(context, int) else _LONGEST_ANSWER


def _local(subjects: Sequence[AnySubject], flag: str) -> list[Subject]:
    local = [subject for subject in subjects if isinstance(subject, Subject)]
    if len(local) < len(subjects):
        raise SafeSteerError(f"{flag}: needs the model in this process; leave it out for a served one.")
    return local


def _reference(subjects: Sequence[Subject]) -> Subject:
    return next((subject for subject in subjects if subject.name == REFERENCE), subjects[0])
