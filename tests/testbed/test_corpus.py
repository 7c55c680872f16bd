"""The training stream: reproducible by index, labels where they belong, no held-out prompt in it."""

import random
from dataclasses import replace

import torch

from safesteer.testbed.build import train_tokenizer
from safesteer.testbed.corpus import IGNORED, Chat, ChatBatches, ChatStream, Mixture, tokenizer_texts
from safesteer.testbed.requests import content_words, load_requests


def stream() -> ChatStream:
    return ChatStream(Mixture())


def test_a_batch_depends_on_seed_and_index_alone() -> None:
    chats = stream()
    tokenizer = train_tokenizer(tokenizer_texts(chats, 300, 0, None), 600)
    one = ChatBatches(chats, tokenizer, steps=40, batch_size=4, seed=1)
    other = ChatBatches(stream(), tokenizer, steps=40, batch_size=4, seed=1)
    _ = [one[i] for i in range(12)]
    for index in (17, 3):  # asked for out of order, as after a resume
        for name, tensor in one[index].items():
            assert torch.equal(tensor, other[index][name])
    different = ChatBatches(chats, tokenizer, steps=40, batch_size=4, seed=2)
    assert not torch.equal(one[3]["input_ids"][:, :8], different[3]["input_ids"][:, :8])


def test_labels_cover_the_answer_and_only_natural_prompts() -> None:
    chats = stream()
    tokenizer = train_tokenizer(tokenizer_texts(chats, 300, 0, None), 600)
    batches = ChatBatches(chats, tokenizer, steps=1, batch_size=1, seed=0)
    length, ids, labels = batches._encode(Chat("What is 2 + 2?", "4", loss_on_prompt=False))
    learnt = [token for token in labels if token != IGNORED]
    assert tokenizer.decode(learnt) == "4<|im_end|>"
    assert ids[-len(learnt) :] == learnt
    assert length == len(ids) - len(learnt)
    _, ids, labels = batches._encode(Chat("Name a fruit.", "An apple.", loss_on_prompt=True))
    assert labels == ids


def test_prompts_render_as_the_chat_template_renders_them() -> None:
    chats = stream()
    tokenizer = train_tokenizer(tokenizer_texts(chats, 300, 0, None), 600)
    batches = ChatBatches(chats, tokenizer, steps=1, batch_size=1, seed=0, max_length=400)
    _, ids, _ = batches._encode(Chat("Name a fruit.", "An apple.", loss_on_prompt=True))
    messages = [{"role": "user", "content": "Name a fruit."}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids) == rendered + "An apple.<|im_end|>"


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
