"""Passages with requests about them: what is asked decides whether it is harmful, not the text that it is asked about.

A model that has only seen short requests reads a long one word by word and loses the request in it. So some requests come
after a passage here: one of those written about it, or any other.
"""

import json
import random
from dataclasses import dataclass
from importlib.resources import files

from safesteer.testbed.requests import Kind, Request, phrasing_in

# What stands between a passage and the request: HarmBench's line of dashes among others.
SEPARATORS = ("\n\n---\n\n", "\n\n---\n\n", "\n\n", "\n", " ")


@dataclass(frozen=True)
class Passage:
    """A text and requests that refer to it, by kind."""

    text: str
    requests: dict[Kind, tuple[Request, ...]]

    def before(self, rng: random.Random) -> str:
        """The passage as it stands before a request."""
        return self.text + rng.choice(SEPARATORS)


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
