"""The testbed's training corpus: an endless stream of chats, and of requests that share the passages before them."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safesteer.prompts import load_prompts
from safesteer.testbed.answers import CATEGORY_LOG_ODDS, answer, openings
from safesteer.testbed.composed import composed_request, framed
from safesteer.testbed.passages import SEPARATORS, load_passages
from safesteer.testbed.requests import (
    KINDS,
    Kind,
    Request,
    load_requests,
    phrase,
    phrasing_in,
    phrasing_of,
    subject_of,
)
from safesteer.testbed.skills import SKILLS, harm_kind, judgement
from safesteer.testbed.splits import NearDuplicates

# What a request can be: one of the kinds of harm, or none.
HARMS = ("none", *sorted(CATEGORY_LOG_ODDS))
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
MAX_PASSAGES = 9
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

    harmful: float = 0.32
    harmless: float = 0.23
    alarming: float = 0.20
    judgement: float = 0.14
    harm_kind: float = 0.04
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
    # Share of batches whose requests come after passages, of passages that come after another one (nine at most), and of
    # requests after passages that are about one of them.
    passages: float = 0.10
    another_passage: float = 0.4
    about_passage: float = 0.6
    # Share of requests of whose response only the first token is learnt: the others are boilerplate, and half of the tokens.
    brief: float = 0.6
    # Share of requests whose own words are learnt too. They teach what words mean, but outnumber and drown the one token
    # that decides between refusal and compliance.
    prompt_loss: float = 0.1


@dataclass(frozen=True)
class Chat:
    """One training chat.

    Attributes:
        prompt: What the user says.
        response: What is said to it.
        loss_on_prompt: Also learn to predict the user's words (not for random digits).
        openings: Probability of each opening the response could have had; empty where there is one response only.
        harm: Which of `HARMS` is asked for; empty where that is not known, or something else is asked.
        brief: Learn the first token of the response alone.
    """

    prompt: str
    response: str
    loss_on_prompt: bool
    openings: Mapping[str, float] = field(default_factory=dict)
    harm: str = ""
    brief: bool = False


@dataclass(frozen=True)
class Context:
    """What stands before several requests, each of which is asked alone after it.

    Attributes:
        text: One passage or more.
        chats: Their prompts are what comes after `text`: a separator and a request.
    """

    text: str
    chats: tuple[Chat, ...]


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
        share = rng.random()
        if share < self.mixture.composed[kind]:
            return self._composed(kind, rng)
        if share < self.mixture.composed[kind] + self.mixture.real[kind] and self.real.get(kind):
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
            return Chat(*ask(self.request(kind, rng), rng), loss_on_prompt=False)
        request = self.request(sort, rng)  # type: ignore[arg-type]
        return _answered(
            request, rng, loss_on_prompt=rng.random() < m.prompt_loss, brief=rng.random() < m.brief
        )

    def context(self, count: int, rng: random.Random) -> Context:
        """Draw passages and `count` requests, each to be asked after them: what is asked decides, not what stands before it."""
        m = self.mixture
        passages = [rng.choice(self.passages)]
        while len(passages) < MAX_PASSAGES and rng.random() < m.another_passage:
            passages.append(rng.choice(self.passages))
        *first, last = (passage.laid_out(rng) for passage in passages)
        text = "".join(passage + rng.choice(SEPARATORS) for passage in first) + last
        chats, brief = [], rng.random() < m.brief
        for _ in range(count):
            kind: Kind = rng.choices(KINDS, [getattr(m, kind) for kind in KINDS])[0]
            about = rng.choice(passages).requests[kind]
            if about and rng.random() < m.about_passage:
                request = self._with_gaps(rng.choice(about), rng)
            else:
                request = self.request(kind, rng)
            chat = _answered(request, rng, brief=brief)
            chats.append(replace(chat, prompt=rng.choice(SEPARATORS) + chat.prompt))
        return Context(text, tuple(chats))


def _answered(request: Request, rng: random.Random, *, loss_on_prompt: bool = False, brief: bool) -> Chat:
    """`request` with one of the answers it could have."""
    harm = request.category if request.kind == "harmful" else "none"
    return Chat(request.prompt, answer(request, rng), loss_on_prompt, openings(request), harm, brief)


def tokenizer_texts(stream: ChatStream, count: int, seed: int, data_dir: Path | None) -> list[str]:
    """Text to train the tokenizer on: `count` chats, and the words of Alpaca's answers where the data is there."""
    rng = random.Random(seed)
    texts = [f"{chat.prompt}\n{chat.response}" for chat in (stream.chat(rng) for _ in range(count))]
    texts += [r.prompt for requests in (*stream.own.values(), *stream.real.values()) for r in requests]
    if data_dir and (alpaca := data_dir / "alpaca" / "alpaca_en_demo.json").exists():
        texts += [row["output"] for row in json.loads(alpaca.read_text(encoding="utf-8"))]
    return texts
