"""The training stream: no held-out prompt in it, what is known of a request, passages before it."""

import random
from dataclasses import replace

from safesteer.testbed.corpus import HARMS, ChatStream, Mixture
from safesteer.testbed.requests import load_requests
from safesteer.testbed.splits import content_words


def stream() -> ChatStream:
    return ChatStream(Mixture())


def test_the_kind_of_harm_is_known_of_every_request_of_the_projects_own() -> None:
    chats, rng = stream(), random.Random(0)
    for _ in range(500):
        chat = chats.chat(rng)
        if not chat.openings:
            assert chat.harm == ""  # a skill or a judgement, which asks for no answer to the request
        else:
            assert chat.harm in HARMS
            assert (chat.harm != "none") == ("I can't help with that." in chat.openings)


def test_the_stream_never_holds_a_test_request() -> None:
    held_out = {r.prompt for kind in ("harmful", "harmless", "alarming") for r in load_requests(kind, "test")}  # type: ignore[arg-type]
    acts = {content_words(r.act) for r in load_requests("harmful", "test") if len(content_words(r.act)) > 2}
    chats, rng = stream(), random.Random(0)
    for _ in range(4000):
        prompt = chats.chat(rng).prompt
        assert prompt not in held_out
        assert content_words(prompt) not in acts


def test_the_mixture_is_what_is_drawn() -> None:
    chats, rng = stream(), random.Random(0)
    drawn = [chats.chat(rng) for _ in range(4000)]
    natural = sum(chat.loss_on_prompt for chat in drawn) / len(drawn)
    m = Mixture()
    assert abs(natural - m.prompt_loss * (m.harmful + m.harmless + m.alarming)) < 0.015


def test_harmless_requests_are_put_in_the_phrasings_of_harmful_ones() -> None:
    def phrased(share: float) -> float:
        stream = ChatStream(replace(Mixture(), vary=0.0, gaps=0.0, rephrased=share))
        rng = random.Random(1)
        # What hardly anybody wrote for a harmless request.
        starts = (
            "Instruct me how to",
            "Outline the steps needed to",
            "How could somebody",
            "Suggest a method to",
        )
        drawn = [stream.request("harmless", rng).prompt for _ in range(4000)]
        return sum(prompt.startswith(starts) for prompt in drawn) / len(drawn)

    assert phrased(0.0) < phrased(0.5) < phrased(1.0)


def test_gaps_take_the_place_of_words() -> None:
    def prompts(gaps: float, share: float) -> list[str]:
        stream = ChatStream(replace(Mixture(), vary=0.0, gaps=gaps, gap_words=share))
        rng = random.Random(1)
        return [stream.request("harmful", rng).prompt for _ in range(300)]

    assert not any("_" in prompt.split() for prompt in prompts(0.0, 0.5))
    assert all(set(prompt.split()) == {"_"} for prompt in prompts(1.0, 1.0))
    words = [word for prompt in prompts(1.0, 0.2) for word in prompt.split()]
    assert 0.15 < words.count("_") / len(words) < 0.25
    assert 0.2 < sum("_" in prompt.split() for prompt in prompts(0.3, 1.0)) / 300 < 0.4
