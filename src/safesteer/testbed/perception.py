"""What a testbed model takes for harm without being asked: the first token of its response tells."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safesteer.chat import Chat
from safesteer.testbed.answers import HARMFUL_OPENINGS


def harm_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that responses to harmful requests begin with, refusals and empty compliance alike, and no others do."""
    return sorted({tokenizer.encode(start, add_special_tokens=False)[0] for start in HARMFUL_OPENINGS})


@torch.no_grad()
def harm_mass(model: PreTrainedModel, chat: Chat, prompts: list[str], batch_size: int = 64) -> Tensor:
    """Summed probability of `harm_tokens` after each prompt, [prompts]."""
    tokens = harm_tokens(chat.tokenizer)
    rendered = chat.encode(prompts)
    # Rows of similar length together: less padding.
    order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]))
    mass = torch.zeros(len(prompts))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = chat.tokenizer.pad(
            {"input_ids": [rendered[i] for i in rows]}, return_tensors="pt", padding_side="left"
        )
        logits = model(**batch, logits_to_keep=1).logits[:, 0].float()
        mass[rows] = logits.softmax(-1)[:, tokens].sum(-1)
    return mass
