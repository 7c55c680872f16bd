"""Passages: well formed, far from what is held out, and answered by what is asked after them."""

import random
from dataclasses import replace
from pathlib import Path

from safesteer.testbed.answers import CATEGORY_LOG_ODDS, topic_of
from safesteer.testbed.corpus import ChatStream, Mixture, held_out_benchmarks
from safesteer.testbed.passages import load_passages
from safesteer.testbed.requests import KINDS, NearDuplicates, Request, load_requests


def requests_about_passages() -> list[Request]:
    return [r for passage in load_passages() for kind in KINDS for r in passage.requests[kind]]


def test_passages_are_distinct_and_have_requests_of_every_kind() -> None:
    passages = load_passages()
    assert len({passage.text for passage in passages}) == len(passages) > 300
    for passage in passages:
        assert 30 < len(passage.text.split()) < 160
        assert "\n" not in passage.text
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


def test_a_chat_with_a_passage_is_about_what_is_asked_after_it() -> None:
    texts = tuple(passage.text for passage in load_passages())
    only_requests = {"judgement": 0.0, "harm_kind": 0.0, "skills": 0.0, "harmful": 0.0, "alarming": 0.0}
    stream = ChatStream(
        replace(Mixture(), passages=1.0, prompt_loss=1.0, vary=0.0, gaps=0.0, **only_requests)
    )
    rng = random.Random(0)
    about = {request.prompt for request in requests_about_passages()}
    asked_about = 0
    for _ in range(400):
        chat = stream.chat(rng)
        text = next(text for text in texts if chat.prompt.startswith(text))
        request = chat.prompt.removeprefix(text).lstrip("\n- ")
        asked_about += request in about
        assert topic_of(request) in chat.response
        assert not chat.loss_on_prompt
    assert 0.5 < asked_about / 400 < 0.7


def test_few_chats_have_a_passage() -> None:
    texts = tuple(passage.text for passage in load_passages())
    stream, rng = ChatStream(Mixture()), random.Random(0)
    prompts = [stream.chat(rng).prompt for _ in range(2000)]
    share = sum(any(text in prompt for text in texts) for prompt in prompts) / 2000
    assert abs(share - Mixture().passages * (1 - Mixture().skills)) < 0.015
