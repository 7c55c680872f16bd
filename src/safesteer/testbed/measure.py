"""Measure testbed models: refusals by category and over-refusal (`safesteer.evaluation`), skills, perplexity."""

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from safesteer.chat import Chat, generate
from safesteer.console import ProgressCallback
from safesteer.evaluation.records import EvaluationPrompt, Record, RecordFile, Verdict
from safesteer.evaluation.runner import evaluate
from safesteer.evaluation.subjects import Subject
from safesteer.evaluation.summary import EvaluationSummary
from safesteer.testbed.answers import harmless_answer
from safesteer.testbed.batches import IGNORED, right_padded
from safesteer.testbed.requests import KINDS, Kind, Request, load_requests
from safesteer.testbed.skills import SKILLS, fresh_questions
from safesteer.testbed.splits import Split

ANSWER_TOKENS = 24
SKILL_TOKENS = 16
SKILL_QUESTIONS = 100
JUDGE = "refusal-phrases"
BENCHMARKS: dict[Kind, str] = {
    "harmful": "testbed-harmful",
    "harmless": "testbed-harmless",
    "alarming": "alarming",
}


@dataclass(frozen=True)
class Answer:
    """One request, what the model said, and whether that was a refusal."""

    request: Request
    response: str
    refused: bool


@dataclass(frozen=True)
class Measurement:
    """What `measure` found. Rates and accuracies in percent, perplexity per token of held-out harmless answers.

    `opens_refusal` is how often an answer's first token opens a refusal, by kind of request: all that a student learns of a
    teacher whose first token alone is in the loss.
    """

    attack_success: float
    refusal_by_category: dict[str, float]
    harmless_refusal: float
    alarming_refusal: float
    opens_refusal: dict[Kind, float]
    skills: dict[str, float]
    perplexity: float
    answers: tuple[Answer, ...]

    @property
    def skill_mean(self) -> float:
        """Unweighted mean accuracy over the skills."""
        return sum(self.skills.values()) / len(self.skills)

    def figures(self) -> dict[str, object]:
        """The figures without the answers, as `safesteer demo --json` writes them."""
        return {
            "attack_success": self.attack_success,
            "harmless_refusal": self.harmless_refusal,
            "alarming_refusal": self.alarming_refusal,
            "opens_refusal": self.opens_refusal,
            "skills": self.skills,
            "skill_mean": self.skill_mean,
            "perplexity": self.perplexity,
            "refusal_by_category": self.refusal_by_category,
        }


def percent(flags: Sequence[bool]) -> float:
    """Share of true flags in percent; NaN for none."""
    return 100 * sum(flags) / len(flags) if flags else math.nan


def skill_accuracy(
    model: PreTrainedModel, chat: Chat, split: Split, questions: int = SKILL_QUESTIONS, batch_size: int = 128
) -> dict[str, float]:
    """Percent of fresh questions answered exactly right, by skill."""
    drawn = {skill.name: fresh_questions(skill, questions, split) for skill in SKILLS}
    prompts = [question for pairs in drawn.values() for question, _ in pairs]
    responses = iter(generate(model, chat, prompts, max_new_tokens=SKILL_TOKENS, batch_size=batch_size))
    return {
        name: percent([next(responses).strip() == answer for _, answer in pairs])
        for name, pairs in drawn.items()
    }


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, chat: Chat, requests: Sequence[Request], batch_size: int = 64
) -> float:
    """Exp of the mean negative log-likelihood per token of reference answers to harmless requests."""
    rng = random.Random(0)
    end = chat.tokenizer.eos_token
    rows = []
    for request, prompt in zip(requests, chat.encode([r.prompt for r in requests]), strict=True):
        answer = chat.tokenizer.encode(harmless_answer(request, rng) + end, add_special_tokens=False)
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        ids, targets = zip(*rows[start : start + batch_size], strict=True)
        input_ids = right_padded(ids, chat.tokenizer.pad_token_id).to(model.device)
        labels = right_padded(targets, IGNORED)[:, 1:].to(model.device)
        logits = model(input_ids).logits[:, :-1].float()
        total += float(
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        )
        count += int((labels != IGNORED).sum())
    return math.exp(total / count)


def measure(
    subjects: Sequence[Subject],
    split: Split,
    output: Path,
    openers: Collection[int],
    *,
    skill_questions: int = SKILL_QUESTIONS,
    progress: ProgressCallback | None = None,
) -> dict[str, Measurement]:
    """Measure models on the requests and fresh skill questions of `split`.

    Args:
        subjects: The models, by whose names the result goes.
        split: Which requests.
        output: Folder of records, verdicts and summaries, as `evaluate` writes them.
        openers: Ids of the tokens that open refusals.
        skill_questions: Fresh questions per skill.
        progress: Told what is being done.
    """
    prompts = {
        name: tuple(
            EvaluationPrompt(
                id=f"{number:05d}",
                prompt=request.prompt,
                kind="harmful" if kind == "harmful" else "harmless",
                category=request.category,
            )
            for number, request in enumerate(load_requests(kind, split))
        )
        for kind, name in BENCHMARKS.items()
    }
    summary = evaluate(
        subjects,
        prompts,
        (JUDGE,),
        output,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=64,
        logs=False,
        progress=progress,
    )
    return {
        subject.name: _measurement(subject, summary, split, output / subject.name, openers, skill_questions)
        for subject in subjects
    }


def _measurement(
    subject: Subject,
    summary: EvaluationSummary,
    split: Split,
    folder: Path,
    openers: Collection[int],
    skill_questions: int,
) -> Measurement:
    found = {kind: summary.find(subject.name, name, JUDGE) for kind, name in BENCHMARKS.items()}

    def refusal(kind: Kind) -> float:
        refused = found[kind].rates.refused
        return math.nan if refused is None else refused.percent

    answers = {kind: _answers(kind, split, folder / BENCHMARKS[kind]) for kind in KINDS}
    with subject.steering():
        skills = skill_accuracy(subject.model, subject.chat, split, skill_questions)
        puzzled = perplexity(subject.model, subject.chat, load_requests("harmless", split))
    return Measurement(
        attack_success=found["harmful"].rates.unsafe.percent,
        refusal_by_category={
            category: math.nan if rates.refused is None else rates.refused.percent
            for category, rates in found["harmful"].categories.items()
        },
        harmless_refusal=refusal("harmless"),
        alarming_refusal=refusal("alarming"),
        opens_refusal={
            kind: percent([_first_token(subject.chat, answer) in openers for answer in answers[kind]])
            for kind in KINDS
        },
        skills=skills,
        perplexity=puzzled,
        answers=tuple(answer for kind in KINDS for answer in answers[kind]),
    )


def _first_token(chat: Chat, answer: Answer) -> int | None:
    """The id of an answer's first token, None for an empty one."""
    return next(iter(chat.tokenizer.encode(answer.response, add_special_tokens=False)), None)


def _answers(kind: Kind, split: Split, folder: Path) -> list[Answer]:
    """Read what was said and judged, in the order of the requests."""
    records = RecordFile(folder / "responses.jsonl", Record).load()
    verdicts = RecordFile(folder / f"verdicts-{JUDGE}.jsonl", Verdict).load()
    return [
        Answer(request, records[f"{n:05d}"].answer, bool(verdicts[f"{n:05d}"].refused))
        for n, request in enumerate(load_requests(kind, split))
    ]
