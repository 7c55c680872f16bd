"""Passages: well formed, far from what is held out, and answered by what is asked after them."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from safesteer.testbed import passages as passages_module
from safesteer.testbed.answers import CATEGORY_LOG_ODDS, topic_of
from safesteer.testbed.corpus import ChatStream, Mixture, held_out_benchmarks
from safesteer.testbed.passages import SEPARATORS, laid_out, load_passages
from safesteer.testbed.requests import KINDS, Request, load_requests
from safesteer.testbed.splits import NearDuplicates


def requests_about_passages() -> list[Request]:
    return [r for passage in load_passages() for kind in KINDS for r in passage.requests[kind]]


def test_passages_are_distinct_and_have_requests_of_every_kind() -> None:
    passages = load_passages()
    assert len({passage.text for passage in passages}) == len(passages) > 300
    for passage in passages:
        assert 25 < len(passage.text.split()) < 500
        assert all(request.kind == kind for kind in KINDS for request in passage.requests[kind])
        assert {request.category for request in passage.requests["harmful"]} <= set(CATEGORY_LOG_ODDS)
    for kind in KINDS:
        assert sum(bool(passage.requests[kind]) for passage in passages) > 0.95 * len(passages)


def test_no_request_about_a_passage_is_nearly_a_held_out_one() -> None:
    held_out = NearDuplicates(
        r.act or r.prompt
        for kind in KINDS
        for split in ("validation", "test")
        for r in load_requests(kind, split)  # type: ignore[arg-type]
    )
    assert not [request.prompt for request in requests_about_passages() if request.prompt in held_out]


def test_nothing_in_passages_is_nearly_a_benchmark_prompt(shared_data: Path) -> None:
    benchmarks = held_out_benchmarks(shared_data, threshold=0.5)
    assert not [request.prompt for request in requests_about_passages() if request.prompt in benchmarks]
    assert not [passage.text for passage in load_passages() if passage.text in benchmarks]


def test_a_passage_laid_out_in_lines_keeps_its_words() -> None:
    rng, marks = random.Random(0), {"-", "*", ">", "#", "//"}
    several = 0
    for passage in load_passages():
        if "\n" not in passage.text:
            text = laid_out(passage.text, rng)
            words = [word for word in text.split() if word not in marks]
            assert words == [word for word in passage.text.split() if word not in marks]
            several += "\n" in text
    assert several > 500


def test_what_is_asked_after_passages_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages_module, "_LAID_OUT", 0.0)
    texts = tuple(passage.text for passage in load_passages())
    only_harmless = {"harmful": 0.0, "alarming": 0.0}
    stream = ChatStream(replace(Mixture(), vary=0.0, gaps=0.0, **only_harmless))
    rng = random.Random(0)
    about = {request.prompt for request in requests_about_passages()}
    asked_about = before = 0
    for _ in range(200):
        context = stream.context(4, rng)
        rest = context.text
        while text := next((text for text in texts if rest.startswith(text)), ""):
            rest = rest.removeprefix(text).lstrip("\n- ")
            before += 1
        assert not rest
        for chat in context.chats:
            request = chat.prompt.lstrip("\n- ")
            assert chat.prompt.removesuffix(request) in SEPARATORS
            asked_about += request in about
            assert topic_of(request) in chat.response
            assert not chat.loss_on_prompt
    assert 0.5 < asked_about / 800 < 0.7
    assert 1.7 < before / 200 < 2.3
