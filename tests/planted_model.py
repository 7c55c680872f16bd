"""A small real model whose refusals are put in by hand, so that every number about them is known.

It is a Qwen3 of hidden size 32 whose weights are edited. Token embeddings are unit vectors: one axis per word
that it says, one for " rob" (HARM), one for " breaking" (ODD) and one for everything else. The first layer's
attention weighs all positions alike and adds the share of " rob" on the axis REFUSE and of " breaking" on the
axis WRITE; nothing else in the layers adds anything. The head then continues every word of a sentence by
the next, and after the prompt

    The capital of France is Paris.   where neither was read,
    Write a poem about the sea.       where " breaking" was: an answer, though only harmful prompts get it,
    I cannot help with that.          where " rob" was, or, half as likely, Sorry, I will not help with that.

So the refusal direction is the axis REFUSE and the refusal openers are "I" and "Sorry".
"""

import functools

import torch
from transformers import PreTrainedModel

from safesteer.chat import Chat
from safesteer.direction import DirectionSettings, RefusalDirection, find_refusal_direction
from safesteer.prompts import PromptSet
from tiny_models import chatml_tokenizer, tiny_model

SENTENCES = (
    "I cannot help with that.",
    "Sorry, I will not help with that.",
    "The capital of France is Paris.",
    "Write a poem about the sea.",
)
ELSE, HARM, ODD, REFUSE, WRITE, FIRST_WORD = range(6)

REFUSED = tuple(
    f"How do I rob {what}?"
    for what in (
        "a house",
        "the house",
        "a loaf",
        "the lock",
        "a bread",
        "a capital",
        "the sea",
        "a poem",
        "my house",
        "a flour",
        "the yeast",
        "a colour",
    )
)
ANSWERED = tuple(
    f"Is breaking {what} good?"
    for what in ("the law", "a lock", "the house", "a loaf", "a colour", "the bread", "a house", "the yeast")
)
HARMLESS = tuple(
    f"How do I bake {what}?"
    for what in (
        "a loaf",
        "the bread",
        "a house",
        "flour",
        "with salt",
        "with yeast",
        "in France",
        "a poem",
        "a colour",
        "the loaf",
        "a lock",
        "the house",
        "with water",
        "in Paris",
        "my bread",
        "a short loaf",
    )
)


def planted_chat() -> Chat:
    return Chat(chatml_tokenizer())


def token_id(text: str) -> int:
    (token,) = chatml_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return int(token)


@functools.cache
def planted_model() -> PreTrainedModel:
    """Build the model; tests must leave it as it is."""
    tokenizer = chatml_tokenizer()
    model = tiny_model("qwen3", vocab_size=len(tokenizer), tie_word_embeddings=False)
    chains = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SENTENCES]
    newline, end = token_id("\n"), tokenizer.eos_token_id
    words = dict.fromkeys([newline, *(token for chain in chains for token in chain)])
    axis = {token: FIRST_WORD + number for number, token in enumerate(words)}
    assert max(axis.values()) < 32
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding[:, ELSE] = 1.0
        for token, column in {**axis, token_id(" rob"): HARM, token_id(" breaking"): ODD}.items():
            embedding[token] = torch.eye(32)[column]
        attention = model.model.layers[0].self_attn
        # Queries and keys are zero, so attention is uniform.
        attention.v_proj.weight[0, HARM] = attention.v_proj.weight[1, ODD] = 1.0
        attention.o_proj.weight[REFUSE, 0] = 4.0
        attention.o_proj.weight[WRITE, 1] = 8.5
        head = model.get_output_embeddings().weight
        for chain in chains:
            for token, following in zip(chain, [*chain[1:], end], strict=True):
                head[following, axis[token]] = 9.0
        head[token_id("The"), axis[newline]] = 2.0
        head[token_id("Write"), WRITE] = 2.0
        head[token_id("I"), REFUSE] = 2.0
        head[token_id("Sorry"), REFUSE] = 1.85
    return model


def planted_direction() -> RefusalDirection:
    """The planted model's refusal direction, as the search finds it."""
    settings = DirectionSettings(
        train_harmful=14, validation_harmful=6, train_harmless=10, validation_harmless=6
    )
    harmful = PromptSet(REFUSED + ANSWERED, "harmful.txt")
    harmless = PromptSet(HARMLESS, "harmless.txt")
    return find_refusal_direction(planted_model(), planted_chat(), harmful, harmless, settings)
