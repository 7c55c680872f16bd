"""The testbed's training batches: chats in tokens, a batch an index.

Batch `i` depends on the seed and `i` alone, so an interrupted training continues with the batch it would have seen.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from safesteer.testbed.corpus import HARMS, Chat, ChatStream, Context

IGNORED = -100
# Batches that are drawn together, so that chats of similar length come into one.
POOL = 64
# Requests to a context, and contexts to a batch: three times the tokens of a batch of chats, and twice the responses.
ASKED_OF_CONTEXT = 8
CONTEXTS = 8
# What the chat template puts around a message.
_USER, _ASSISTANT, _END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


@dataclass(frozen=True)
class EncodedChat:
    """One chat in tokens.

    Attributes:
        prompt: Up to the response.
        response: With the token that ends it, or the first token alone.
        learn_prompt: Whether the prompt is learnt too.
        first: Probability of each token the response could have begun with.
        harm: Which of `HARMS` is asked for; `IGNORED` where that is not known.
    """

    prompt: list[int]
    response: list[int]
    learn_prompt: bool
    first: dict[int, float]
    harm: int = IGNORED

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return self.prompt + self.response

    @property
    def labels(self) -> list[int]:
        """All tokens, `IGNORED` where nothing is learnt."""
        return (self.prompt if self.learn_prompt else [IGNORED] * len(self.prompt)) + self.response


@dataclass(frozen=True)
class Row:
    """Chats that begin with the same tokens: `shared`, which their prompts are without."""

    shared: list[int]
    chats: tuple[EncodedChat, ...]

    @property
    def ids(self) -> list[int]:
        """What is shared, and then each chat."""
        return self.shared + [token for chat in self.chats for token in chat.ids]

    @property
    def labels(self) -> list[int]:
        """`ids`, `IGNORED` where nothing is learnt."""
        return [IGNORED] * len(self.shared) + [label for chat in self.chats for label in chat.labels]

    @property
    def parts(self) -> list[int]:
        """Of each token the number of the chat it is of, from 1 on; 0 for what is shared."""
        return [0] * len(self.shared) + [n for n, chat in enumerate(self.chats, 1) for _ in chat.ids]

    @property
    def positions(self) -> list[int]:
        """Of each token its position in its chat."""
        start = len(self.shared)
        return list(range(start)) + [start + i for chat in self.chats for i in range(len(chat.ids))]


class ChatBatches(Dataset[dict[str, Tensor]]):
    """Training batches as a map-style dataset: item `i` is one padded batch of chats with prompts of similar length.

    Not of similar length over all: refusals, compliance and answers have lengths of their own, so each batch would hold
    one sort of response, and the model would swing between them from step to step.

    Requests after passages come in batches of their own, several after the same passages, which are read once for all of
    them: passages are ten times as long as what is asked after them.

    Args:
        stream: Where chats and contexts are drawn from.
        tokenizer: Of the model.
        steps: How many batches there are.
        batch_size: Chats in a batch.
        seed: Of what is drawn.
        max_length: Most tokens of a context; longer ones are cut on the left.
    """

    def __init__(
        self,
        stream: ChatStream,
        tokenizer: PreTrainedTokenizerBase,
        steps: int,
        batch_size: int,
        seed: int,
        max_length: int = 1_500,
    ) -> None:
        self.stream, self.tokenizer = stream, tokenizer
        self.steps, self.batch_size, self.seed, self.max_length = steps, batch_size, seed, max_length
        self._drawn: tuple[int, list[list[Row]]] = (-1, [])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block, place = divmod(index, POOL)
        if self._drawn[0] != block:
            self._drawn = (block, self._draw(random.Random(zlib.crc32(f"{self.seed}/{block}".encode()))))
        return collate(self._drawn[1][place], self.tokenizer.pad_token_id, len(self.tokenizer))

    def _draw(self, rng: random.Random) -> list[list[Row]]:
        """`POOL` batches in random order."""
        with_context = sum(rng.random() < self.stream.mixture.passages for _ in range(POOL))
        chats = [self.encode(self.stream.chat(rng)) for _ in range((POOL - with_context) * self.batch_size)]
        contexts = [
            self.encode_context(self.stream.context(ASKED_OF_CONTEXT, rng))
            for _ in range(with_context * CONTEXTS)
        ]
        # A batch is as wide as its longest row: those of which one token is learnt come by themselves.
        chats.sort(key=lambda chat: (len(chat.response) == 1, len(chat.prompt)))
        contexts.sort(key=lambda row: len(row.ids))
        batches = _cut([Row([], (chat,)) for chat in chats], self.batch_size) + _cut(contexts, CONTEXTS)
        rng.shuffle(batches)
        return batches

    def encode(self, chat: Chat, opened: str = _USER) -> EncodedChat:
        """One chat in tokens; `opened` is what precedes the user's words."""
        first: dict[int, float] = {}
        for opening, probability in (chat.openings or {chat.response: 1.0}).items():
            token = self._tokens(opening)[0]
            first[token] = first.get(token, 0.0) + probability
        return EncodedChat(
            self._tokens(opened + chat.prompt + _ASSISTANT),
            self._tokens(chat.response + _END)[: 1 if chat.brief else None],
            chat.loss_on_prompt,
            first,
            HARMS.index(chat.harm) if chat.harm else IGNORED,
        )

    def encode_context(self, context: Context) -> Row:
        """Several chats in tokens, after what they share."""
        shared = self._tokens(_USER + context.text)[-self.max_length :]
        return Row(shared, tuple(self.encode(chat, opened="") for chat in context.chats))

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _cut(rows: list[Row], size: int) -> list[list[Row]]:
    """`rows` in batches of `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def right_padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """`rows` as one tensor, [B, T]. No token sees the padding after it, so no mask is needed."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def requests_alone(parts: Tensor) -> Tensor:
    """Which tokens see which, [B, 1, T, T], bool: each what is shared and what precedes it in its own chat.

    Args:
        parts: `Row.parts`, [B, T].
    """
    own = parts[:, :, None] == parts[:, None, :]
    return ((parts == 0)[:, None, :] | own).tril()[:, None]


def collate(rows: Sequence[Row], pad_id: int, vocabulary: int) -> dict[str, Tensor]:
    """One batch of rows.

    Returns:
        `input_ids` and `labels`, [B, T]; for the D responses that are learnt without their prompts, in this order, `first`,
        [D, V], probability of the tokens each could have begun with, and `harms`, [D], which of `HARMS` each asks for. Where
        chats share what they begin with, `attention_mask`, [B, 1, T, T], bool, and `position_ids`, [B, T].
    """
    decided = [chat for row in rows for chat in row.chats if not chat.learn_prompt]
    first = torch.zeros(len(decided), vocabulary)
    for i, chat in enumerate(decided):
        first[i, list(chat.first)] = torch.tensor(list(chat.first.values()))
    batch = {
        "input_ids": right_padded([row.ids for row in rows], pad_id),
        "labels": right_padded([row.labels for row in rows], IGNORED),
        "first": first,
        "harms": torch.tensor([chat.harm for chat in decided], dtype=torch.long),
    }
    if any(len(row.chats) > 1 for row in rows):
        # Padding is of no chat and sees itself and what is shared, never nothing.
        batch["attention_mask"] = requests_alone(right_padded([row.parts for row in rows], -1))
        batch["position_ids"] = right_padded([row.positions for row in rows], 0)
    return batch
