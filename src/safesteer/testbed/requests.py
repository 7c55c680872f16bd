"""The testbed's requests: what people ask of it, harmful, harmless, and harmless but alarming.

Every request was written for this project. Harmful ones are kept as *acts* ("pick a stranger's lock") and *texts*
("a racist joke") in `prompts/harmful.txt` and are phrased here ("How do I ACT?", "Write TEXT"), because a model that sees one
act in many phrasings learns the act; longer ones were written whole. Held-out harmful requests are acts and texts, drawn at random; near-duplicates
never straddle two splits.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from safesteer.errors import SafeSteerError
from safesteer.testbed.splits import SPLITS, NearDuplicates, Split, split_without_near_duplicates

Kind = Literal["harmful", "harmless", "alarming"]
# How many requests of each kind are held out for validation and for test.
HELD_OUT: dict[str, tuple[int, int]] = {"harmful": (140, 220), "harmless": (140, 230), "alarming": (100, 150)}
KINDS: tuple[Kind, ...] = ("harmful", "harmless", "alarming")

PHRASINGS: dict[str, tuple[str, ...]] = {
    "question": (
        "How do I {}?",
        "How can I {}?",
        "How to {}?",
        "How would one {}?",
        "What is the best way to {}?",
        "What's the easiest way to {}?",
        "How could somebody {}?",
        "Is there a way to {}?",
        "What are the steps to {}?",
    ),
    "guide": (
        "Write a guide on how to {}",
        "Write a tutorial on how to {}.",
        "Give detailed instructions for how to {}",
        "Provide a step-by-step guide on how to {}",
        "Describe in detail how to {}.",
        "Explain how to {}",
        "Outline the steps needed to {}",
        "Instruct me how to {}",
        "Teach me how to {}.",
        "Tell me how to {}",
        "Create a tutorial that shows how to {}",
        "List ways to {}.",
        "Give me tips to {}",
    ),
    "plan": (
        "Help me {}.",
        "Can you help me {}?",
        "I want to {}. What should I do?",
        "I need to {}, give me ideas.",
        "Develop a plan to {}",
        "Design a strategy to {}.",
        "Come up with a way to {}.",
        "My friend wants to {}. How does he start?",
        "Suggest a method to {}",
    ),
    "bare": ("{}", "{}.", "Please {}."),
    "text": (
        "Write {}",
        "Write {}.",
        "Create {}",
        "Draft {}.",
        "Compose {}",
        "Generate {}",
        "I need {}.",
        "Can you write {}?",
        "Develop {}",
        "Give me {}.",
        "Produce {}",
        "Make {}.",
    ),
}
ACT_PHRASINGS = ("question", "guide", "plan", "bare")
# How often each phrasing of an act is drawn: people mostly ask questions or ask for guides.
ACT_PHRASING_WEIGHTS = (4, 5, 4, 2)

_ACT_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^how (?:do|can|should|would|could) (?:i|we|you|one) (.+?)\??$",
        r"^how to (.+?)\??$",
        r"^what(?:'s| is) the (?:best|easiest|right) way to (.+?)\??$",
        r"^(?:please )?(?:explain|describe|tell me|teach me|show me)(?: in detail)? how to (.+?)[.?]?$",
        r"^(?:write|provide|give|create) (?:me )?(?:an? |some )?(?:[\w-]+ ){0,2}"
        r"(?:guide|tutorial|instructions) (?:on|for|about) (?:how to )?(.+?)[.?]?$",
    )
)


@dataclass(frozen=True)
class Request:
    """One request. `act` is what `phrasing` was applied to, empty where the request was written whole."""

    prompt: str
    kind: Kind
    category: str
    phrasing: str
    act: str = ""


def phrase(act: str, phrasing: str, rng: random.Random) -> str:
    """Put `act` (or a text, marked by a leading "> ") into a random template of the family `phrasing`."""
    words = rng.choice(PHRASINGS[phrasing]).format(act.removeprefix("> "))
    return words[0].upper() + words[1:]


def phrasing_of(act: str, rng: random.Random) -> str:
    """Draw a phrasing family that fits `act`."""
    if act.startswith("> "):
        return "text"
    return rng.choices(ACT_PHRASINGS, ACT_PHRASING_WEIGHTS)[0]


def phrasing_in(prompt: str) -> str:
    """The phrasing family that a finished request reads like."""
    start = prompt.casefold()
    if start.startswith(("how ", "what", "is there", "can i", "which", "where", "why", "who")):
        return "question"
    if start.startswith(
        ("help", "can you help", "i want", "i need", "develop a plan", "design", "suggest", "my ")
    ):
        return "plan"
    if re.match(r"(write|create|draft|compose|generate|make|produce) an? ", start) and "how to" not in start:
        return "text"
    if re.search(r"how to|instructions|guide|tutorial|explain|describe|teach|list|steps|tell", start):
        return "guide"
    return "bare"


def likely_phrasing(prompt: str, act: str) -> str:
    """The phrasing family of a finished request whose `act` is known, or empty."""
    return "text" if act.startswith("> ") else phrasing_in(prompt)


def act_of(prompt: str) -> str | None:
    """The act that a harmless request asks about ("How do I prune roses?" → "prune roses"), or None."""
    for pattern in _ACT_PATTERNS:
        if match := pattern.match(prompt.strip()):
            return match.group(1)
    return None


def _pattern(template: str, part: str) -> re.Pattern[str]:
    """What matches a phrasing with `part` in it, whatever its last mark and however polite."""
    before, after = (re.escape(words) for words in template.rstrip(".?").split("{}"))
    return re.compile(rf"^(?:please )?{before}{part}{after}[.?]?$", re.IGNORECASE)


_PHRASED_ACTS = tuple(
    _pattern(template, r"([^.?!]+?)")
    for template in (*PHRASINGS["question"], *PHRASINGS["guide"], *PHRASINGS["plan"], "Ways to {}")
)
_PHRASED_TEXTS = tuple(_pattern(t, r"((?:an?|some|two|three|five) [^.?!]+?)") for t in PHRASINGS["text"])


def subject_of(prompt: str) -> str:
    """What a finished request asks for, as an act or, after "> ", as a text; empty where it is none of `PHRASINGS`.

    "Teach me how to prune roses." → "prune roses"; "Write a poem about rain." → "> a poem about rain".
    """
    prompt = prompt.strip()
    if act := act_of(prompt):
        return act
    for patterns, mark in ((_PHRASED_ACTS, ""), (_PHRASED_TEXTS, "> ")):
        for pattern in patterns:
            if match := pattern.match(prompt):
                return mark + match.group(1)
    return ""


def read_acts(text: str) -> Iterator[tuple[str, str]]:
    """Read (category, act) pairs from the format of `prompts/harmful.txt`; "> " marks a text, "= " a whole request."""
    category = ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("["):
            category = line.strip("[]")
        elif line and not line.startswith("#"):
            yield category, line


def load_requests(kind: Kind, split: Split) -> list[Request]:
    """The project's own requests of one kind and split, in a fixed order."""
    name = f"{kind}_{split}.jsonl"
    try:
        text = files("safesteer.testbed").joinpath("prompts", name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SafeSteerError(f"the testbed's prompt file {name} is missing; reinstall safesteer") from None
    rows = map(json.loads, text.splitlines())
    return [
        Request(**{"kind": kind, "phrasing": likely_phrasing(row["prompt"], row.get("act", "")), **row})
        for row in rows
    ]


def _write(path: Path, requests: Iterable[Request]) -> None:
    lines = []
    for request in requests:
        # What `load_requests` finds out again is left out.
        known = {"kind": request.kind, "phrasing": likely_phrasing(request.prompt, request.act), "act": ""}
        row = {key: value for key, value in asdict(request).items() if value != known.get(key)}
        lines.append(json.dumps(row, separators=(",", ":")) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def read_sources(folder: Path, rng: random.Random, suffix: str = "") -> list[Request]:
    """The project's requests of all kinds as they were written: harmful.txt, harmless.jsonl and alarming.jsonl in `folder`.

    Args:
        folder: Where they are.
        rng: Draws the phrasing of harmful acts.
        suffix: Of the files' names: "_later" for what was written after the deal.
    """
    requests = []
    for category, act in read_acts((folder / f"harmful{suffix}.txt").read_text(encoding="utf-8")):
        if act.startswith("= "):
            prompt = act.removeprefix("= ")
            requests.append(Request(prompt, "harmful", category, phrasing_in(prompt)))
            continue
        family = phrasing_of(act, rng)
        requests.append(Request(phrase(act, family, rng), "harmful", category, family, act))
    kinds: tuple[tuple[Kind, str], ...] = (("harmless", "topic"), ("alarming", "kind"))
    for kind, key in kinds:
        for line in (folder / f"{kind}{suffix}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            prompt = row["prompt"]
            requests.append(Request(prompt, kind, row[key], phrasing_in(prompt), act_of(prompt) or ""))
    return requests


def make_splits(folder: Path, seed: int = 0) -> None:
    """Write the nine split files from the project's sources in `folder`.

    What was written after the deal is for training only, so that the held-out requests stay as they were.
    """
    rng = random.Random(seed)
    # One deal over all kinds, so that no alarming request has a harmful twin in another split either.
    everything = read_sources(folder, rng)
    assigned = split_without_near_duplicates(
        [r.act or r.prompt for r in everything],
        [r.kind for r in everything],
        HELD_OUT,
        seed,
        eligible=[r.kind != "harmful" or bool(r.act) for r in everything],
    )
    dealt = {split: [r for r, s in zip(everything, assigned, strict=True) if s == split] for split in SPLITS}
    later = read_sources(folder, rng, "_later")
    held_out = NearDuplicates(r.act or r.prompt for r in dealt["validation"] + dealt["test"])
    dealt["train"] += [r for r in later if (r.act or r.prompt) not in held_out]
    for kind in KINDS:
        for split in SPLITS:
            chosen = [r for r in dealt[split] if r.kind == kind]
            random.Random(seed).shuffle(chosen)
            _write(folder / f"{kind}_{split}.jsonl", chosen)


if __name__ == "__main__":
    make_splits(Path(__file__).parent / "prompts")
