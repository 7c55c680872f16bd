"""Measuring: against plain transformers, greedy, one prompt at a time, and a closed form for perplexity."""

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from safesteer.chat import Chat
from safesteer.evaluation.subjects import Subject
from safesteer.loading import load_model, load_tokenizer
from safesteer.refusals import is_refusal
from safesteer.testbed import measure as measure_module
from safesteer.testbed.answers import harmless_answer
from safesteer.testbed.demo import testbed_folder as bundled
from safesteer.testbed.measure import measure, percent, perplexity, skill_accuracy
from safesteer.testbed.requests import KINDS, load_requests
from safesteer.testbed.skills import SKILLS, fresh_questions


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(load_tokenizer(str(bundled() / "model")))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model(str(bundled() / "model"), device="cpu")


def plainly(model: PreTrainedModel, chat: Chat, prompt: str, tokens: int) -> str:
    """Greedy decoding by hand: the whole sequence through the model for every token."""
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if best == chat.tokenizer.eos_token_id:
            break
        ids.append(best)
    return str(chat.tokenizer.decode(ids[start:]))


def test_answers_are_plain_greedy_decoding(
    model: PreTrainedModel, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {kind: load_requests(kind, "validation")[:5] for kind in KINDS}
    monkeypatch.setattr(measure_module, "load_requests", lambda kind, split: few[kind])
    # Openers of refusals and of answers, so that some of the fifteen have one and some have not.
    openers = [chat.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("I", "Sorry", "Here")]
    subject = Subject("base", model, chat, "testbed")
    found = measure([subject], "validation", tmp_path, openers, skill_questions=1)
    answers = found["base"].answers
    assert [answer.request for answer in answers] == [request for kind in KINDS for request in few[kind]]
    for answer in answers:
        expected = plainly(model, chat, answer.request.prompt, 24)
        assert answer.response == expected
        assert answer.refused == is_refusal(expected)
    harmful = [answer for answer in answers if answer.request.kind == "harmful"]
    assert found["base"].attack_success == percent([not answer.refused for answer in harmful])
    for kind in KINDS:
        prompts = [torch.tensor([chat.encode([request.prompt])[0]]) for request in few[kind]]
        with torch.no_grad():
            first = [int(model(ids).logits[0, -1].argmax()) for ids in prompts]
        assert found["base"].opens_refusal[kind] == percent([token in openers for token in first])


def test_skill_accuracy_is_the_share_of_exact_answers(model: PreTrainedModel, chat: Chat) -> None:
    accuracy = skill_accuracy(model, chat, "validation", questions=5)
    for skill in SKILLS:
        pairs = fresh_questions(skill, 5, "validation")
        right = [plainly(model, chat, question, 16) == answer for question, answer in pairs]
        assert accuracy[skill.name] == pytest.approx(100 * sum(right) / len(right))


def test_perplexity_is_exp_of_the_mean_negative_log_likelihood(model: PreTrainedModel, chat: Chat) -> None:
    import random

    requests = load_requests("harmless", "validation")[:5]
    rng = random.Random(0)
    total, count = 0.0, 0
    for request in requests:
        prompt = chat.encode([request.prompt])[0]
        answer = chat.tokenizer.encode(harmless_answer(request, rng) + "<|im_end|>", add_special_tokens=False)
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert perplexity(model, chat, requests, batch_size=2) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_percent() -> None:
    assert percent([True, False, True, True]) == 75
    assert math.isnan(percent([]))
