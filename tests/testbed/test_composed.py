"""Composed requests: in minimal pairs, labelled by their verbs, never near a held-out request."""

import random

from safesteer.testbed.answers import CATEGORY_LOG_ODDS
from safesteer.testbed.composed import CONTRABAND, GOODS, PEOPLE, PLACES, THINGS, composed_request, framed
from safesteer.testbed.corpus import ChatStream, Mixture
from safesteer.testbed.requests import KINDS, load_requests
from safesteer.testbed.splits import content_words, similarity


def test_no_verb_and_no_object_is_on_both_sides() -> None:
    for pairing in (PEOPLE, PLACES, THINGS):
        harmful = {verb for verbs in pairing.harmful.values() for verb in verbs}
        assert not harmful & set(pairing.harmless)
        assert all("@" in verb for verb in (*harmful, *pairing.harmless))
    assert not {thing for things in CONTRABAND.values() for thing in things} & set(GOODS)


def test_harmful_ones_have_a_category_and_harmless_ones_none() -> None:
    rng = random.Random(0)
    for _ in range(500):
        assert composed_request("harmful", rng).category in CATEGORY_LOG_ODDS
        assert composed_request("harmless", rng).category == ""
        assert composed_request("alarming", rng).kind == "alarming"


def test_nothing_unfinished_is_left_in_a_prompt() -> None:
    rng = random.Random(0)
    for _ in range(500):
        for kind in KINDS:
            prompt = composed_request(kind, rng).prompt
            assert not {"@", "{", "}", "\n", "  "} & {
                prompt[i : i + n] for n in (1, 2) for i in range(len(prompt))
            }


def test_a_frame_holds_the_act() -> None:
    request = framed("rob a bank", random.Random(0))
    assert "rob a bank" in request.prompt and request.kind == "alarming"


def test_the_stream_composes_nothing_near_a_held_out_request() -> None:
    stream, rng = ChatStream(Mixture()), random.Random(0)
    held_out = [
        content_words(r.act or r.prompt)
        for kind in KINDS
        for split in ("validation", "test")
        for r in load_requests(kind, split)  # type: ignore[arg-type]
    ]
    for _ in range(150):
        for kind in KINDS:
            request = stream._composed(kind, rng)
            bag = content_words(request.act or request.prompt)
            assert max(similarity(bag, other) for other in held_out) < 0.5
