"""What a testbed model takes for harm: tokens that no other response begins with, and their mass prompt by prompt."""

import random

import pytest
import torch

from safesteer.chat import Chat
from safesteer.loading import load_model, load_tokenizer
from safesteer.testbed.answers import openings
from safesteer.testbed.demo import testbed_folder as bundled
from safesteer.testbed.perception import harm_mass, harm_tokens
from safesteer.testbed.requests import KINDS, load_requests


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(load_tokenizer(str(bundled() / "model")))


def test_only_harmful_requests_get_responses_that_begin_so(chat: Chat) -> None:
    tokens = set(harm_tokens(chat.tokenizer))
    for kind in KINDS:
        for request in load_requests(kind, "validation"):
            starts = {
                chat.tokenizer.encode(start, add_special_tokens=False)[0] for start in openings(request)
            }
            assert starts <= tokens if kind == "harmful" else not starts & tokens


def test_the_mass_is_that_of_each_prompt_alone(chat: Chat) -> None:
    model = load_model(str(bundled() / "model"), device="cpu", dtype="float32")
    rng = random.Random(0)
    prompts = [rng.choice(load_requests(kind, "validation")).prompt for kind in KINDS for _ in range(4)]
    tokens = harm_tokens(chat.tokenizer)
    alone = []
    with torch.no_grad():
        for row in chat.encode(prompts):
            alone.append(model(torch.tensor([row])).logits[0, -1].double().softmax(-1)[tokens].sum())
    found = harm_mass(model, chat, prompts, batch_size=5)
    torch.testing.assert_close(found.double(), torch.stack(alone), rtol=1e-4, atol=1e-6)
