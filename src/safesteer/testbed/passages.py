"""Passages with requests about them: what is asked decides whether it is harmful, not the text that it is asked about.

A model that has only seen short requests reads a long one word by word and loses the request in it. So some requests come
after a passage here: one of those written about it, or any other.
"""

import json
import random
import re
from dataclasses import dataclass
from importlib.resources import files

from safesteer.testbed.requests import Kind, Request, phrasing_in

# What stands between a passage and the request: HarmBench's line of dashes among others.
SEPARATORS = ("\n\n---\n\n", "\n\n---\n\n", "\n\n", "\n", " ")
# What stands before each line of a passage that is laid out in lines, and after it: paragraphs, lists, quotes, code.
_LAYOUTS = (
    *(("", "\n"), ("", "\n\n"), ("", "\n\n"), ("- ", "\n"), ("* ", "\n"), ("> ", "\n")),
    *(("# ", "\n"), ("// ", "\n"), ("    ", "\n"), ("\t", "\n"), (" * ", "\n")),
)
_LAID_OUT = 0.5


@dataclass(frozen=True)
class Passage:
    """A text and requests that refer to it, by kind."""

    text: str
    requests: dict[Kind, tuple[Request, ...]]

    def laid_out(self, rng: random.Random) -> str:
        """The passage as it stands before a request. Half of those that are one line are laid out in several."""
        if "\n" not in self.text and rng.random() < _LAID_OUT:
            return laid_out(self.text, rng)
        return self.text


def laid_out(text: str, rng: random.Random) -> str:
    """`text` with a line a sentence or clause, some of them run on, in one of several layouts."""
    lead, end = rng.choice(_LAYOUTS)
    run_on = rng.choice((0.0, 0.3, 0.6))
    lines = [""]
    for part in re.split(r"(?<=[.!?;:{}]) ", text):
        if lines[-1] and rng.random() >= run_on:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part
    return end.join(lead + line for line in lines)


def load_passages() -> list[Passage]:
    """The project's own passages, all for training, in a fixed order.

    A row of `prompts/passages.jsonl` has `passage`, `harmful` (pairs of category and request), `alarming` and `harmless`.
    """
    text = files("safesteer.testbed").joinpath("prompts", "passages.jsonl").read_text(encoding="utf-8")
    passages = []
    for row in map(json.loads, text.splitlines()):
        requests: dict[Kind, tuple[Request, ...]] = {
            "harmful": tuple(
                Request(p, "harmful", category, phrasing_in(p)) for category, p in row["harmful"]
            ),
            "alarming": tuple(Request(p, "alarming", "passage", phrasing_in(p)) for p in row["alarming"]),
            "harmless": tuple(Request(p, "harmless", "passage", phrasing_in(p)) for p in row["harmless"]),
        }
        passages.append(Passage(row["passage"], requests))
    return passages
