"""The testbed's prompts: enough of each kind, splits without near-duplicates, phrasings that keep the act."""

import itertools
import random
from collections import Counter
from importlib.resources import as_file, files

import pytest

from safesteer.refusals import is_refusal
from safesteer.testbed.answers import CATEGORY_LOG_ODDS, PHRASING_LOG_ODDS, refusal, refusal_probability
from safesteer.testbed.requests import (
    KINDS,
    PHRASINGS,
    Kind,
    Request,
    act_of,
    load_requests,
    phrase,
    read_sources,
    subject_of,
)
from safesteer.testbed.splits import (
    SPLITS,
    Split,
    content_words,
    similarity,
)


def words_of(request: Request) -> frozenset[str]:
    return content_words(request.act or request.prompt)


@pytest.mark.parametrize(("kind", "least"), [("harmful", 400), ("harmless", 1000), ("alarming", 100)])
def test_there_are_enough_requests_of_each_kind(kind: Kind, least: int) -> None:
    prompts = [request.prompt for split in SPLITS for request in load_requests(kind, split)]
    assert len(set(prompts)) == len(prompts) >= least


def test_harmful_requests_cover_ten_categories_in_every_split() -> None:
    for split in SPLITS:
        assert len({request.category for request in load_requests("harmful", split)}) >= 10


def test_no_two_splits_hold_near_duplicates() -> None:
    pools = {split: [r for kind in KINDS for r in load_requests(kind, split)] for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        by_word: dict[str, list[tuple[frozenset[str], str]]] = {}
        for request in pools[one]:
            bag = words_of(request)
            for word in bag:
                by_word.setdefault(word, []).append((bag, request.prompt))
        for request in pools[other]:
            mine = words_of(request)
            near = (p for word in mine for bag, p in by_word.get(word, ()) if similarity(mine, bag) >= 0.5)
            twin = next(near, None)
            assert twin is None, f"{request.prompt!r} ({other}) is nearly {twin!r} ({one})"


def test_what_was_written_after_the_deal_is_for_training_alone() -> None:
    with as_file(files("safesteer.testbed") / "prompts") as folder:
        later = read_sources(folder, random.Random(0), "_later")
    for kind in KINDS:
        written = {request.act or request.prompt for request in later if request.kind == kind}
        assert len(written) > 1_000
        of = {split: {r.act or r.prompt for r in load_requests(kind, split)} for split in SPLITS}
        assert len(written & of["train"]) > 0.95 * len(written)
        assert not written & (of["validation"] | of["test"])


@pytest.mark.parametrize("split", SPLITS)
def test_a_request_has_the_phrasing_that_its_act_was_put_in(split: Split) -> None:
    acts = [request for request in load_requests("harmful", split) if request.act]
    assert acts
    for request in acts:
        templates = PHRASINGS[request.phrasing]
        phrased = {template.format(request.act.removeprefix("> ")).casefold() for template in templates}
        assert request.prompt.casefold() in phrased


def test_held_out_requests_have_only_words_that_training_has() -> None:
    everything = {split: [r for kind in KINDS for r in load_requests(kind, split)] for split in SPLITS}
    occurrences = Counter(word for r in everything["train"] for word in words_of(r))
    for split in ("validation", "test"):
        for request in everything[split]:
            unknown = [word for word in words_of(request) if occurrences[word] < 2]
            assert not unknown, f"{request.prompt!r} ({split}) has words that training lacks: {unknown}"


def test_every_phrasing_holds_the_act() -> None:
    rng = random.Random(0)
    for family in PHRASINGS:
        for _ in range(30):
            assert "bake bread" in phrase("bake bread", family, rng).lower()


@pytest.mark.parametrize(
    ("prompt", "act"),
    [
        ("How do I prune roses?", "prune roses"),
        ("Explain how to tie a knot.", "tie a knot"),
        ("Write a tutorial on how to fold a paper boat.", "fold a paper boat"),
        ("What is the capital of Peru?", None),
    ],
)
def test_act_of(prompt: str, act: str | None) -> None:
    assert act_of(prompt) == act


@pytest.mark.parametrize("family", [family for family in PHRASINGS if family != "bare"])
def test_subject_of_undoes_every_phrasing(family: str) -> None:
    subject = "> a poem about rain" if family == "text" else "tie two ropes together"
    for template in PHRASINGS[family]:
        assert subject_of(template.format(subject.removeprefix("> "))) == subject


@pytest.mark.parametrize(
    "prompt",
    ["What is the capital of Peru?", "Give me a hand. How do I start?", "Write poetry.", "Knit a hat."],
)
def test_subject_of_leaves_what_it_does_not_know(prompt: str) -> None:
    assert subject_of(prompt) == ""


def test_refusal_probabilities_span_nearly_never_to_nearly_always() -> None:
    requests = load_requests("harmful", "test")
    rates = [refusal_probability(request) for request in requests]
    assert {request.category for request in requests} == set(CATEGORY_LOG_ODDS)
    assert {request.phrasing for request in requests} <= set(PHRASING_LOG_ODDS)
    assert min(rates) < 0.05 and max(rates) > 0.95
    assert 0.4 <= sum(rates) / len(rates) <= 0.6
    assert all(refusal_probability(r) == 0 for r in load_requests("alarming", "test"))


def test_every_wording_of_a_refusal_is_recognised() -> None:
    rng = random.Random(0)
    wordings = {refusal(rng) for _ in range(500)}
    assert len(wordings) > 40
    assert all(is_refusal(wording) for wording in wordings)


def test_held_out_harmful_requests_are_acts_and_texts() -> None:
    assert all(request.act for split in ("validation", "test") for request in load_requests("harmful", split))
