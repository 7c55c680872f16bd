"""The testbed's requests: what people ask of it, harmful, harmless, and harmless but alarming.

Every request was written for this project. Harmful ones are kept as *acts* ("pick a stranger's lock") and *texts*
("a racist joke") in `prompts/harmful.txt` and are phrased here ("How do I ACT?", "Write TEXT"), because a model that sees one
act in many phrasings learns the act. Splits are made by act, and near-duplicates never straddle two splits.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from safesteer.errors import SafeSteerError

Kind = Literal["harmful", "harmless", "alarming"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
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
_STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "can",
        "do",
        "does",
        "for",
        "from",
        "get",
        "give",
        "help",
        "how",
        "i",
        "in",
        "into",
        "is",
        "it",
        "make",
        "me",
        "my",
        "of",
        "on",
        "one",
        "or",
        "people",
        "someone",
        "somebody",
        "tell",
        "that",
        "the",
        "their",
        "this",
        "to",
        "want",
        "way",
        "what",
        "who",
        "with",
        "without",
        "write",
        "you",
        "your",
    ]
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


def act_of(prompt: str) -> str | None:
    """The act that a harmless request asks about ("How do I prune roses?" → "prune roses"), or None."""
    for pattern in _ACT_PATTERNS:
        if match := pattern.match(prompt.strip()):
            return match.group(1)
    return None


def content_words(text: str) -> frozenset[str]:
    """The words of `text` that carry its meaning, for telling near-duplicates."""
    return frozenset(re.findall(r"[a-z0-9']+", text.casefold())) - _STOP_WORDS


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity of two sets of words; 1 for two empty ones."""
    return len(a & b) / len(a | b) if a | b else 1.0


def split_without_near_duplicates(
    texts: Sequence[str], fractions: tuple[float, float, float], seed: int, threshold: float = 0.5
) -> list[Split]:
    """Assign each text to train, validation or test so that texts alike in ≥ `threshold` stay together.

    Near-duplicates (Jaccard similarity of content words) are joined into groups by union–find; whole groups are dealt out.
    """
    words = [content_words(text) for text in texts]
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    by_word: dict[str, list[int]] = {}
    for i, bag in enumerate(words):
        for word in bag:
            for j in by_word.get(word, ()):
                if similarity(bag, words[j]) >= threshold:
                    parent[root(i)] = root(j)
            by_word.setdefault(word, []).append(i)
    groups: dict[int, list[int]] = {}
    for i in range(len(texts)):
        groups.setdefault(root(i), []).append(i)
    shuffled = sorted(groups.values())
    random.Random(seed).shuffle(shuffled)
    assigned: list[Split] = ["train"] * len(texts)
    filled = dict.fromkeys(SPLITS, 0)
    for group in shuffled:
        # Large groups of alike requests would make a poor held-out set: they go to training.
        due: Split = "train"
        if len(group) <= 3:
            due = max(SPLITS, key=lambda s: fractions[SPLITS.index(s)] * len(texts) - filled[s])
        for i in group:
            assigned[i] = due
        filled[due] += len(group)
    return assigned


def read_acts(text: str) -> Iterator[tuple[str, str]]:
    """Read (category, act) pairs from the format of `prompts/harmful.txt`."""
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
    return [Request(kind=kind, **json.loads(line)) for line in text.splitlines()]


def _write(path: Path, requests: Iterable[Request]) -> None:
    rows = ({k: v for k, v in asdict(request).items() if k != "kind"} for request in requests)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_splits(folder: Path, seed: int = 0) -> None:
    """Write the nine split files from the project's sources in `folder` (harmful.txt, harmless.jsonl, alarming.jsonl)."""
    fractions = (0.70, 0.12, 0.18)
    rng = random.Random(seed)
    harmful = []
    for category, act in read_acts((folder / "harmful.txt").read_text(encoding="utf-8")):
        family = phrasing_of(act, rng)
        harmful.append(Request(phrase(act, family, rng), "harmful", category, family, act))
    pools: dict[Kind, list[Request]] = {"harmful": harmful}
    for kind, key in (("harmless", "topic"), ("alarming", "kind")):
        rows = [
            json.loads(line) for line in (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        pools[kind] = [  # type: ignore[index]
            Request(row["prompt"], kind, row[key], phrasing_in(row["prompt"]), act_of(row["prompt"]) or "")  # type: ignore[arg-type]
            for row in rows
        ]
    # One deal over all kinds, so that no alarming request has a harmful twin in another split either.
    everything = [request for kind in KINDS for request in pools[kind]]
    assigned = split_without_near_duplicates([r.act or r.prompt for r in everything], fractions, seed)
    for kind in KINDS:
        for split in SPLITS:
            chosen = [r for r, s in zip(everything, assigned, strict=True) if r.kind == kind and s == split]
            random.Random(seed).shuffle(chosen)
            _write(folder / f"{kind}_{split}.jsonl", chosen)


if __name__ == "__main__":
    make_splits(Path(__file__).parent / "prompts")
