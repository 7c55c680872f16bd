"""Which texts are nearly the same, and splits that have none of them on both sides."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
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


def content_words(text: str) -> frozenset[str]:
    """The words of `text` that carry its meaning, for telling near-duplicates."""
    return frozenset(re.findall(r"[a-z0-9']+", text.casefold())) - _STOP_WORDS


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity of two sets of words; 1 for two empty ones."""
    return len(a & b) / len(a | b) if a | b else 1.0


class NearDuplicates:
    """Tells which texts are nearly one of `texts`: Jaccard similarity of content words of at least `threshold`."""

    def __init__(self, texts: Iterable[str], threshold: float = 0.5) -> None:
        self.threshold = threshold
        self._by_word: dict[str, list[frozenset[str]]] = {}
        for bag in map(content_words, texts):
            for word in bag:
                self._by_word.setdefault(word, []).append(bag)

    def __contains__(self, text: str) -> bool:
        bag = content_words(text)
        return any(
            similarity(bag, other) >= self.threshold for word in bag for other in self._by_word.get(word, ())
        )


def split_without_near_duplicates(
    texts: Sequence[str],
    kinds: Sequence[str],
    held_out: Mapping[str, tuple[int, int]],
    seed: int,
    *,
    eligible: Sequence[bool] | None = None,
    threshold: float = 0.5,
    occurrences: int = 2,
) -> list[Split | None]:
    """Draw validation and test texts at random and leave out of training what is too like them.

    The held-out texts are drawn evenly from all, so that they are as ordinary as the training ones. (Keeping whole clusters of
    near-duplicates together instead leaves only the loners to hold out: requests that resemble no other.)

    Args:
        texts: What is compared.
        kinds: The kind of each text.
        held_out: How many texts of each kind validation and test shall have (fewer where there are not as many).
        seed: Of the draw.
        eligible: Which texts may be held out; None for all.
        threshold: Jaccard similarity of content words from which two texts are near-duplicates.
        occurrences: In how many training texts each word of a held-out text has to occur: a model that has learnt all its
            words here cannot know others, as a pretrained one would.

    Returns:
        The split of each text; None for near-duplicates of a held-out text, which belong to no split.
    """
    words = [content_words(text) for text in texts]
    by_word: dict[str, list[int]] = {}
    for i, bag in enumerate(words):
        for word in bag:
            by_word.setdefault(word, []).append(i)
    in_training = {word: len(places) for word, places in by_word.items()}
    due = {kind: {"validation": sizes[0], "test": sizes[1]} for kind, sizes in held_out.items()}
    assigned: list[Split | None] = ["train"] * len(texts)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    for i in order:
        wanted = due[kinds[i]]
        split: Split = "validation" if wanted["validation"] > wanted["test"] else "test"
        if wanted[split] <= 0 or assigned[i] != "train" or not words[i] or (eligible and not eligible[i]):
            continue
        alike = {j for word in words[i] for j in by_word[word] if similarity(words[i], words[j]) >= threshold}
        if any(assigned[j] in ("validation", "test") for j in alike):
            continue
        leaving = Counter(word for j in alike if assigned[j] == "train" for word in words[j])
        if any(in_training[word] - leaving[word] < occurrences for word in words[i]):
            continue
        for word, count in leaving.items():
            in_training[word] -= count
        for j in alike:
            assigned[j] = None
        assigned[i] = split
        wanted[split] -= 1
    return assigned
