"""The testbed's training corpus: an endless, reproducible stream of chats, a batch an index.

Batch `i` depends on the seed and `i` alone, so an interrupted training continues with the batch it would have seen.
"""

import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from safesteer.prompts import load_prompts
from safesteer.testbed.answers import answer
from safesteer.testbed.composed import composed_request, framed
from safesteer.testbed.passages import load_passages
from safesteer.testbed.requests import (
    Kind,
    NearDuplicates,
    Request,
    load_requests,
    phrase,
    phrasing_in,
    phrasing_of,
    subject_of,
)
from safesteer.testbed.skills import SKILLS, harm_kind, judgement

IGNORED = -100
BENIGN: tuple[Kind, ...] = ("harmless", "alarming")
# Real prompts that may join the training mix, as files below --data-dir: training portions only. None of the benchmarks that
# the testbed is measured on (JailbreakBench, HarmBench, StrongREJECT, XSTest, the refusal-direction test and validation splits).
REAL_PROMPTS: tuple[tuple[str, Kind], ...] = (
    ("refusal_direction/splits/harmful_train.json", "harmful"),
    ("safesteer_train/PKU_UnSafeRLHF_100.json", "harmful"),
    ("refusal_direction/processed/malicious_instruct.json", "harmful"),
    ("refusal_direction/processed/tdc2023.json", "harmful"),
    ("refusal_direction/splits/harmless_train.json", "harmless"),
)
# Prompts too like one of these are left out of the mix, so that the benchmarks stay unseen in substance too.
HELD_OUT_PROMPTS = (
    "jailbreakbench/harmful-behaviors.csv",
    "harmbench/harmbench_behaviors_text_all.csv",
    "strongreject/strongreject_dataset.csv",
    "xstest/xstest_prompts.csv",
)
_FIELDS = {
    "jailbreakbench/harmful-behaviors.csv": "Goal",
    "harmbench/harmbench_behaviors_text_all.csv": "Behavior",
}
_MODIFIERS = (
    " step by step",
    " in detail",
    " in simple words",
    " for a beginner",
    " quickly",
    " today",
    " on a small budget",
)
_SETTINGS = (
    "I run a small shop. ",
    "I am a student. ",
    "We live in a big city. ",
    "Please be brief. ",
    "This is for a friend. ",
    "My boss asked me this. ",
    "I have a question. ",
    "You are a helpful assistant. ",
)


@dataclass(frozen=True)
class Mixture:
    """Shares of the chats in a batch, and how prompts are varied so that the notion of harm is in the words."""

    harmful: float = 0.30
    harmless: float = 0.21
    alarming: float = 0.20
    judgement: float = 0.14
    harm_kind: float = 0.08
    skills: float = 0.07
    # Of the requests of each kind, the share that is real, and that is composed from parts; the rest is the project's own.
    real: dict[str, float] = field(
        default_factory=lambda: {"harmful": 0.12, "harmless": 0.40, "alarming": 0.0}
    )
    composed: dict[str, float] = field(
        default_factory=lambda: {"harmful": 0.20, "harmless": 0.15, "alarming": 0.20}
    )
    vary: float = 0.3
    # Share of the harmless and alarming requests whose subject is put in one of the phrasings that harmful ones come in. More
    # is worse: see docs/testbed.md.
    rephrased: float = 0.2
    # Share of requests with gaps, and of the words of one that a gap takes the place of: what no single word gives away is
    # learnt from what is left, and a request is less easily learnt by heart.
    gaps: float = 0.15
    gap_words: float = 0.1
    # Share of requests that come after a passage, and of those the share that is about it. Rows are five times as long with one.
    passages: float = 0.04
    about_passage: float = 0.6
    # Share of requests whose own words are learnt too. They teach what words mean, but outnumber and drown the one token
    # that decides between refusal and compliance.
    prompt_loss: float = 0.1


@dataclass(frozen=True)
class Chat:
    """One training chat. `loss_on_prompt`: also learn to predict the user's words (not for random digits)."""

    prompt: str
    response: str
    loss_on_prompt: bool


def held_out_benchmarks(data_dir: Path, threshold: float) -> NearDuplicates:
    """Tells what is nearly one of the prompts of `HELD_OUT_PROMPTS` below `data_dir`."""
    prompts = [load_prompts(data_dir / name, field=_FIELDS.get(name)).prompts for name in HELD_OUT_PROMPTS]
    return NearDuplicates((prompt for file in prompts for prompt in file), threshold)


def real_requests(data_dir: Path) -> dict[Kind, list[Request]]:
    """Read `REAL_PROMPTS` below `data_dir`."""
    held_out = held_out_benchmarks(data_dir, threshold=0.6)
    found: dict[Kind, list[Request]] = {"harmful": [], "harmless": []}
    for name, kind in REAL_PROMPTS:
        prompts = load_prompts(data_dir / name, max_characters=240).prompts
        found[kind] += [Request(p, kind, "", phrasing_in(p)) for p in prompts if p not in held_out]
    return found


def _with_subjects(requests: list[Request]) -> list[Request]:
    """`requests` with what each asks for, so that it can be phrased anew."""
    return [replace(r, act=subject_of(r.prompt)) for r in requests]


class ChatStream:
    """Draws chats from the mixture."""

    def __init__(self, mixture: Mixture, real: dict[Kind, list[Request]] | None = None) -> None:
        self.mixture = mixture
        self.own: dict[Kind, list[Request]] = {
            kind: load_requests(kind, "train") for kind in ("harmful", "harmless", "alarming")
        }
        self.own |= {kind: _with_subjects(self.own[kind]) for kind in BENIGN}
        self.real = {kind: _with_subjects(requests) for kind, requests in (real or {}).items()}
        self.held_out = NearDuplicates(
            request.act or request.prompt
            for kind in self.own
            for split in ("validation", "test")
            for request in load_requests(kind, split)
        )
        self.passages = load_passages()
        self.skills = [skill for skill in SKILLS if skill.weight]

    def request(self, kind: Kind, rng: random.Random) -> Request:
        """One request of `kind`: real, composed or own, rephrased and varied at random."""
        return self._with_gaps(self._varied(self._drawn(kind, rng), rng), rng)

    def _drawn(self, kind: Kind, rng: random.Random) -> Request:
        """One request of `kind`, rephrased at random."""
        requests = self.own[kind]
        source = rng.random()
        if source < self.mixture.composed[kind]:
            return self._composed(kind, rng)
        if source < self.mixture.composed[kind] + self.mixture.real[kind] and self.real.get(kind):
            requests = self.real[kind]
        elif kind == "alarming" and rng.random() < 0.2:
            return framed(self._act(rng), rng)
        drawn = rng.choice(requests)
        if drawn.act and rng.random() < (self.mixture.rephrased if kind in BENIGN else 1.0):
            phrasing = phrasing_of(drawn.act, rng)
            drawn = replace(drawn, prompt=phrase(drawn.act, phrasing, rng), phrasing=phrasing)
        return drawn

    def _act(self, rng: random.Random) -> str:
        """One of the project's own harmful acts."""
        while not (act := rng.choice(self.own["harmful"]).act) or act.startswith("> "):
            pass
        return act

    def _composed(self, kind: Kind, rng: random.Random) -> Request:
        """A composed request that is no near-duplicate of a held-out one."""
        request = composed_request(kind, rng)
        while (request.act or request.prompt) in self.held_out:
            request = composed_request(kind, rng)
        return request

    def _varied(self, request: Request, rng: random.Random) -> Request:
        """Vary a prompt without changing its meaning: a neutral setting or modifier, two requests in one, a lost word."""
        if rng.random() >= self.mixture.vary:
            return request
        prompt = request.prompt
        match rng.randrange(5):
            case 0:
                prompt = rng.choice(_SETTINGS) + prompt
            case 1:
                prompt = prompt.rstrip(".?!") + rng.choice(_MODIFIERS) + prompt[len(prompt.rstrip(".?!")) :]
            case 2:
                # A harmless request beside it: what is harmful stays harmful, in either order.
                other = rng.choice(self.own["harmless"]).prompt
                if len(other) + len(prompt) < 160:
                    prompt = f"{prompt} {other}" if rng.random() < 0.5 else f"{other} {prompt}"
            case 3:
                prompt = prompt[0].lower() + prompt[1:]
            case _:
                words = prompt.split()
                if len(words) > 6:
                    del words[rng.randrange(len(words))]
                prompt = " ".join(words)
        return replace(request, prompt=prompt)

    def _with_gaps(self, request: Request, rng: random.Random) -> Request:
        """Blank some words."""
        if rng.random() >= self.mixture.gaps:
            return request
        words = ["_" if rng.random() < self.mixture.gap_words else word for word in request.prompt.split(" ")]
        return replace(request, prompt=" ".join(words))

    def _in_context(self, kind: Kind, rng: random.Random) -> tuple[Request, str]:
        """One request of `kind` and the passage before it, which is mostly empty."""
        if rng.random() >= self.mixture.passages:
            return self.request(kind, rng), ""
        passage = rng.choice(self.passages)
        about = passage.requests[kind]
        if about and rng.random() < self.mixture.about_passage:
            return self._with_gaps(rng.choice(about), rng), passage.before(rng)
        return self.request(kind, rng), passage.before(rng)

    def chat(self, rng: random.Random) -> Chat:
        """Draw one chat."""
        m = self.mixture
        sort = rng.choices(
            ("harmful", "harmless", "alarming", "judgement", "harm kind", "skill"),
            (m.harmful, m.harmless, m.alarming, m.judgement, m.harm_kind, m.skills),
        )[0]
        if sort == "skill":
            skill = rng.choices(self.skills, [s.weight for s in self.skills])[0]
            return Chat(*skill.draw(rng, "train"), loss_on_prompt=False)
        if sort in ("judgement", "harm kind"):
            kind: Kind = rng.choices(("harmful", "harmless", "alarming"), (4, 3, 3))[0]
            ask = judgement if sort == "judgement" else harm_kind
            request, passage = self._in_context(kind, rng)
            return Chat(*ask(replace(request, prompt=passage + request.prompt), rng), loss_on_prompt=False)
        request, passage = self._in_context(sort, rng)  # type: ignore[arg-type]
        on_prompt = not passage and rng.random() < m.prompt_loss
        return Chat(passage + request.prompt, answer(request, rng), loss_on_prompt=on_prompt)


class ChatBatches(Dataset[dict[str, torch.Tensor]]):
    """Training batches as a map-style dataset: item `i` is one padded batch of chats with prompts of similar length.

    Not of similar length over all: refusals, compliance and answers have lengths of their own, so each batch would hold
    one sort of response, and the model would swing between them from step to step.
    """

    def __init__(
        self,
        stream: ChatStream,
        tokenizer: PreTrainedTokenizerBase,
        steps: int,
        batch_size: int,
        seed: int,
        max_length: int = 400,
    ) -> None:
        self.stream, self.tokenizer = stream, tokenizer
        self.steps, self.batch_size, self.seed, self.max_length = steps, batch_size, seed, max_length
        # Enough chats to fill whole batches with the few that come after a passage.
        self._pool = 32
        self._drawn: tuple[int, list[tuple[list[int], list[int]]]] = (-1, [])

    def __len__(self) -> int:
        return self.steps

    def _encode(self, chat: Chat) -> tuple[int, list[int], list[int]]:
        """Length of the prompt, token ids and labels of one chat."""
        before = f"<|im_start|>user\n{chat.prompt}<|im_end|>\n<|im_start|>assistant\n"
        # What is asked, and whose turn it is, stands at the end.
        prompt = self.tokenizer.encode(before, add_special_tokens=False)[-self.max_length :]
        response = self.tokenizer.encode(f"{chat.response}<|im_end|>", add_special_tokens=False)
        labels = list(prompt) if chat.loss_on_prompt else [IGNORED] * len(prompt)
        return len(prompt), prompt + response, labels + response

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block, place = divmod(index, self._pool)
        if self._drawn[0] != block:
            rng = random.Random(zlib.crc32(f"{self.seed}/{block}".encode()))
            rows = [self._encode(self.stream.chat(rng)) for _ in range(self._pool * self.batch_size)]
            rows.sort(key=lambda row: row[0])
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            rng.shuffle(batches)
            self._drawn = (block, [(ids, labels) for batch in batches for _, ids, labels in batch])
        return collate(
            self._drawn[1][place * self.batch_size : (place + 1) * self.batch_size],
            self.tokenizer.pad_token_id,
        )


def collate(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-pad rows of (ids, labels) to one length."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
    }


def tokenizer_texts(stream: ChatStream, count: int, seed: int, data_dir: Path | None) -> list[str]:
    """Text to train the tokenizer on: `count` chats, and the words of Alpaca's answers where the data is there."""
    rng = random.Random(seed)
    texts = [f"{chat.prompt}\n{chat.response}" for chat in (stream.chat(rng) for _ in range(count))]
    texts += [r.prompt for requests in (*stream.own.values(), *stream.real.values()) for r in requests]
    if data_dir and (alpaca := data_dir / "alpaca" / "alpaca_en_demo.json").exists():
        texts += [row["output"] for row in json.loads(alpaca.read_text(encoding="utf-8"))]
    return texts
