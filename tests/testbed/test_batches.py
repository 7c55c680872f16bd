"""The training batches: reproducible by index, labels where they belong, chats that share a context as if they were alone."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from safesteer.testbed.answers import answer, openings
from safesteer.testbed.batches import IGNORED, ChatBatches, EncodedChat, Row, collate
from safesteer.testbed.build import BuildSettings, new_model, train_tokenizer
from safesteer.testbed.corpus import Chat, ChatStream, Context, Mixture, tokenizer_texts
from safesteer.testbed.requests import Request


def stream() -> ChatStream:
    return ChatStream(Mixture())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(tokenizer_texts(stream(), 300, 0, None), 600)


def one_batch(tokenizer: PreTrainedTokenizerFast) -> ChatBatches:
    return ChatBatches(stream(), tokenizer, steps=1, batch_size=1, seed=0)


def test_a_batch_depends_on_seed_and_index_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    one = ChatBatches(stream(), tokenizer, steps=40, batch_size=4, seed=1)
    other = ChatBatches(stream(), tokenizer, steps=40, batch_size=4, seed=1)
    _ = [one[i] for i in range(12)]
    for index in (17, 3):  # asked for out of order, as after a resume
        for name, tensor in one[index].items():
            assert torch.equal(tensor, other[index][name])
    different = ChatBatches(stream(), tokenizer, steps=40, batch_size=4, seed=2)
    assert not torch.equal(one[3]["input_ids"][:, :8], different[3]["input_ids"][:, :8])


def test_labels_cover_the_answer_and_only_natural_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = one_batch(tokenizer)
    chat = batches.encode(Chat("What is 2 + 2?", "4", loss_on_prompt=False))
    learnt = [token for token in chat.labels if token != IGNORED]
    assert tokenizer.decode(learnt) == "4<|im_end|>"
    assert chat.ids[-len(learnt) :] == learnt == chat.response
    assert chat.first == {learnt[0]: 1.0}
    chat = batches.encode(Chat("Name a fruit.", "An apple.", loss_on_prompt=True))
    assert chat.labels == chat.ids


def test_first_tokens_have_the_probabilities_of_the_answers_that_begin_with_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Against the answers themselves, drawn many times."""
    batches = one_batch(tokenizer)
    requests = [
        Request("How do I pick a lock?", "harmful", "theft", "question"),
        Request("Write a racist joke", "harmful", "hate", "text"),
        Request("List birds.", "harmless", "animals", "guide"),
        Request("Why do cats purr?", "alarming", "science", "question"),
    ]
    for request in requests:
        row = batches.encode(Chat(request.prompt, "Sure.", False, openings(request)))
        assert sum(row.first.values()) == pytest.approx(1)
        rng, draws = random.Random(0), 20_000
        counts = Counter(tokenizer.encode(answer(request, rng))[0] for _ in range(draws))
        assert counts.keys() == row.first.keys()
        for token, probability in row.first.items():
            # Five standard errors.
            assert counts[token] / draws == pytest.approx(probability, abs=5 * (probability / draws) ** 0.5)


def test_a_batch_holds_what_its_responses_could_have_begun_with() -> None:
    one = EncodedChat([5], [6, 7], False, {6: 0.25, 2: 0.75}, 4)
    other = EncodedChat([1], [3], False, {3: 1.0})
    natural = EncodedChat([1, 2], [3], True, {3: 1.0})
    batch = collate([Row([], (chat,)) for chat in (one, natural, other)], pad_id=0, vocabulary=8)
    assert batch.keys() == {"input_ids", "labels", "first", "harms"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 2, 3], [1, 3, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [1, 2, 3], [IGNORED, 3, IGNORED]]
    assert batch["first"].tolist() == [[0, 0, 0.75, 0, 0, 0, 0.25, 0], [0, 0, 0, 1, 0, 0, 0, 0]]
    assert batch["harms"].tolist() == [4, IGNORED]


def test_chats_that_share_a_context_are_read_as_if_each_were_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Against the same chats, each with its context before it, one at a time."""
    batches, rng = one_batch(tokenizer), random.Random(0)
    drawn = stream().context(3, rng)
    short = Context(
        "One line.", tuple(Chat(f" {word}?", "Yes.", False) for word in ("Who", "What", "Where is it"))
    )
    rows = [batches.encode_context(context) for context in (drawn, short)]
    torch.manual_seed(0)
    settings = BuildSettings(vocabulary=600, hidden_size=32, intermediate_size=64, layers=2, heads=2)
    model = new_model(tokenizer, settings).double()
    batch = collate(rows, tokenizer.pad_token_id, len(tokenizer))
    read = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        together = model(**read).logits
        for row, logits in zip(rows, together, strict=True):
            start = len(row.shared)
            for chat in row.chats:
                alone = model(torch.tensor([row.shared + chat.ids])).logits[0, len(row.shared) :]
                torch.testing.assert_close(logits[start : start + len(chat.ids)], alone, rtol=1e-9, atol=1e-9)
                start += len(chat.ids)


def test_a_context_and_its_requests_are_the_tokens_of_whole_prompts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    batches, chats, rng = one_batch(tokenizer), stream(), random.Random(0)
    for _ in range(30):
        context = chats.context(4, rng)
        row = batches.encode_context(context)
        if len(row.shared) == batches.max_length:
            continue  # cut
        for chat, encoded in zip(context.chats, row.chats, strict=True):
            whole = batches.encode(replace(chat, prompt=context.text + chat.prompt))
            assert row.shared + encoded.ids == whole.ids


def test_of_a_brief_chat_the_first_token_is_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = one_batch(tokenizer).encode(Chat("Name a fruit.", "An apple.", loss_on_prompt=False, brief=True))
    assert [label for label in chat.labels if label != IGNORED] == chat.ids[-1:] == list(chat.first)
    batches = ChatBatches(ChatStream(Mixture(brief=0.5, passages=0.0, prompt_loss=0.0)), tokenizer, 64, 8, 0)
    learnt = [(batches[i]["labels"] != IGNORED).sum(1).max().item() for i in range(64)]
    # Requests are 0.78 of the chats, and half of these are brief; one batch may be mixed.
    assert learnt.count(1) / 64 == pytest.approx(0.39, abs=0.06)


def test_long_contexts_are_cut_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = ChatBatches(stream(), tokenizer, steps=1, batch_size=1, seed=0, max_length=5)
    row = batches.encode_context(Context("one two three four five six", (Chat(" Why?", "So.", False),)))
    assert len(row.shared) == 5
    assert tokenizer.decode(row.ids).endswith("six Why?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>")


def test_as_many_batches_have_contexts_as_the_mixture_says(tokenizer: PreTrainedTokenizerFast) -> None:
    chats = ChatStream(Mixture(passages=0.3))
    batches = ChatBatches(chats, tokenizer, steps=256, batch_size=1, seed=0)
    share = sum("attention_mask" in batches[i] for i in range(256)) / 256
    assert share == pytest.approx(0.3, abs=0.1)


def test_prompts_render_as_the_chat_template_renders_them(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = one_batch(tokenizer).encode(Chat("Name a fruit.", "An apple.", loss_on_prompt=True)).ids
    messages = [{"role": "user", "content": "Name a fruit."}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids) == rendered + "An apple.<|im_end|>"
