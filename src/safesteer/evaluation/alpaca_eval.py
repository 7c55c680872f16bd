r"""AlpacaEval 2: how often a judge prefers a model's answers to GPT-4 Turbo's, corrected for their length.

The 805 instructions and the reference's answers are AlpacaEval's. A judge sees both answers in random order and names
the better one by a single token; its probability of that token is the preference `p`, 0 to 1 (0.5 if the judge cannot
tell). The win rate is the mean of `p`. Judges like long answers, so the length-controlled win rate (Dubois et al. 2024,
arXiv 2404.04475) fits

    logit p(x) = θ + φ · tanh(Δ(x) / sd Δ) + ψ · γ(x),     Δ(x) = length of the model's answer − of the reference's

over the instructions `x` by logistic regression, lengths in characters, γ(x) the published difficulty of `x`, and reports
the mean of `logistic(θ + ψ γ(x))`: what the win rate would be if both had answered at the same length.

Differences from the leaderboard's fit, in `alpaca_eval`'s terms: this is its "length_controlled_noreg" when
`instruction_difficulty.csv` is there and "length_controlled_minimal" (no ψ γ) when it is not. The leaderboard's own adds
two artificial baselines as data of low weight, and chooses an L1 penalty by cross-validation where this has a fixed weak
L2 penalty, `(θ² + φ² + ψ²) / 200` beside the sum of log losses. Rank models by it on one setup; do not set its numbers
beside the leaderboard's to a point.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safesteer.chat import generate
from safesteer.errors import SafeSteerError, one_line
from safesteer.evaluation.capability import chosen_questions
from safesteer.evaluation.pairwise_judge import Comparison, PairwiseJudge, Reference
from safesteer.evaluation.records import RecordFile
from safesteer.evaluation.win_rates import AlpacaEvalScore, Floats, win_rates
from safesteer.next_token import Progress, no_progress
from safesteer.prompt_files import read_rows

if TYPE_CHECKING:
    from safesteer.evaluation.subjects import Subject

ALPACA_EVAL = "alpaca_eval"
"""What `--capability` takes, and the folder of its files below `--data-dir`."""

REFERENCE_FILE = "gpt4_1106_preview_model_outputs.json"
DIFFICULTY_FILE = "instruction_difficulty.csv"
JUDGE_PROMPT_FILE = "alpaca_eval_clf.txt"
"""AlpacaEval's own judge prompt, used in place of ours where somebody put it beside the reference answers."""

_HUB_ID = "tatsu-lab/alpaca_eval"
_HUB_REFERENCE_FILE = "alpaca_eval_gpt4_baseline.json"


def alpaca_eval(
    subject: "Subject",
    judge: PairwiseJudge,
    output: str | Path,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = no_progress,
) -> AlpacaEvalScore:
    """Let a model answer AlpacaEval's instructions, have the answers judged, and compute the win rates.

    Answers are greedy. Answers and verdicts are kept as they come, so that a second call asks for nothing twice.

    Args:
        subject: The model.
        judge: Who compares.
        output: A folder for the comparisons, of this model alone.
        data_dir: The folder of benchmark data; None loads the reference answers from the hub.
        limit: Most instructions, drawn at random; None takes all 805.
        max_new_tokens: Longest answer.
        batch_size: Instructions at a time.
        seed: Of the draw, and of which answer the judge sees first.
        progress: Called as it gets on.

    Raises:
        SafeSteerError: If the data are missing or malformed, or the judge's server cannot be had.
    """
    references, difficulty = load_questions(data_dir)
    chosen = chosen_questions({ALPACA_EVAL: len(references)}, limit, seed)[ALPACA_EVAL]
    identity = {
        "model": subject.identity,
        "chat": subject.chat.fingerprint,
        "judge": judge.where,
        "judge_prompt": judge.prompt,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "instructions": [references[index].instruction for index in chosen],
    }
    # A file of dataclasses with an id and plain fields, as those it was written for.
    file: RecordFile[Any] = RecordFile(Path(output) / "comparisons.jsonl", Comparison, identity)
    done: dict[str, Comparison] = file.load()
    missing = [index for index in chosen if str(index) not in done]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        progress(f"AlpacaEval, {subject.name}", len(done), len(chosen))
        with subject.steering():
            answers = generate(
                subject.model,
                subject.chat,
                [references[index].instruction for index in batch],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
            )
        with ThreadPoolExecutor(max_workers=batch_size) as pool:
            compared = list(
                pool.map(
                    lambda pair: judge.compare(str(pair[0]), references[pair[0]], pair[1], seed),
                    zip(batch, answers, strict=True),
                )
            )
        file.append(compared)
        done |= {comparison.id: comparison for comparison in compared}
    progress(f"AlpacaEval, {subject.name}", len(chosen), len(chosen))
    return win_rates([done[str(index)] for index in chosen], difficulty, judge=judge.where, seed=seed)


def load_questions(data_dir: str | Path | None) -> tuple[list[Reference], Floats | None]:
    """Read the instructions with the reference's answers, and the instructions' difficulty if it is known.

    Args:
        data_dir: The folder of benchmark data; None loads the reference answers from the hub.

    Raises:
        SafeSteerError: As `load_references` and `load_difficulty`.
    """
    folder = None if data_dir is None else Path(data_dir) / ALPACA_EVAL
    references = load_references(folder)
    return references, load_difficulty(folder, len(references))


def load_references(folder: Path | None) -> list[Reference]:
    """Read the instructions and the reference's answers, in AlpacaEval's order.

    Args:
        folder: Where they are; None downloads them from the hub.

    Raises:
        SafeSteerError: If they are not there or malformed.
    """
    path = _from_hub() if folder is None else folder / REFERENCE_FILE
    if not path.is_file():
        raise SafeSteerError(
            f"{path}: no such file; put AlpacaEval's reference answers there, or leave --data-dir out to load "
            f"them from the hub ({_HUB_ID})."
        )
    references = []
    for row in read_rows(path):
        values = (row.fields.get("instruction"), row.fields.get("output"))
        if not all(isinstance(value, str) and value for value in values):
            raise SafeSteerError(
                f"{path} {row.place}: needs the fields 'instruction' and 'output' (the fields are: "
                f"{', '.join(map(str, row.fields))[:100] or 'none'}); get the file again."
            )
        references.append(Reference(str(values[0]), str(values[1])))
    if not references:
        raise SafeSteerError(f"{path}: holds no instructions; get the file again.")
    return references


def load_difficulty(folder: Path | None, count: int) -> Floats | None:
    """Read γ of each instruction where the file is there: `instruction_difficulty.csv` of the hub dataset.

    Args:
        folder: Where it may be.
        count: How many instructions there are.

    Raises:
        SafeSteerError: If it is there but malformed, or of other instructions.
    """
    if folder is None or not (folder / DIFFICULTY_FILE).is_file():
        return None
    path = folder / DIFFICULTY_FILE
    gamma = np.full(count, np.nan)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        for line in filter(str.strip, lines[1:]):
            index, value = line.split(",")
            gamma[int(index)] = float(value)
    except (OSError, ValueError, IndexError) as error:
        raise SafeSteerError(
            f"{path}: is not a table of an index and a number ({one_line(error, 80)}); get the file again or remove "
            "it."
        ) from error
    if not np.isfinite(gamma).all():
        raise SafeSteerError(
            f"{path}: has no number for instruction {int(np.isnan(gamma).argmax())}; get the file again or remove it."
        )
    return gamma


def load_judge_prompt(data_dir: str | Path | None) -> str | None:
    """Read AlpacaEval's own judge prompt if somebody put it beside the reference answers; None otherwise."""
    path = None if data_dir is None else Path(data_dir) / ALPACA_EVAL / JUDGE_PROMPT_FILE
    if path is None or not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SafeSteerError(f"{path}: cannot be read ({one_line(error)}); save it as UTF-8.") from error


def _from_hub() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_HUB_ID, _HUB_REFERENCE_FILE, repo_type="dataset"))
    # The hub client raises many kinds; all of them mean that the file cannot be had.
    except Exception as error:
        raise SafeSteerError(
            f"AlpacaEval: {_HUB_REFERENCE_FILE} of {_HUB_ID} cannot be loaded from the hub ({one_line(error, 120)}); "
            f"check the network, or give --data-dir with {ALPACA_EVAL}/{REFERENCE_FILE}."
        ) from error
