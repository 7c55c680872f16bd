"""Next-token distributions after a prompt: the backbone, then the head on the last position alone."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safesteer.chat import Chat, end_of_turn_ids, left_pad
from safesteer.few_rows import quick_head
from safesteer.modeling import backbone, evaluation_flags, language_head, unwrapped
from safesteer.out_of_memory import InParts
from safesteer.sampling import sampling_options

# Reading all weights and starting all kernels takes as long as this many tokens, roughly.
_PASS_TOKENS = {"cpu": 64, "cuda": 1_024}
# A pass over so many times as many tokens is as good as a larger one.
_FULL_PASSES = 24

Progress = Callable[[str, int, int], None]
"""Called as `progress(what is being done, how many are done, how many there are)`."""


def no_progress(doing: str, done: int, total: int) -> None:
    """Report nothing: what a stage calls when nobody listens."""


def float64(tensor: Tensor) -> Tensor:
    """Widen to float64, on the CPU where the device has none (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def batch_ends(lengths: Sequence[int], most: int, pass_tokens: int) -> list[int]:
    """Cut rows into batches of the least work: tokens with their padding, and `pass_tokens` for every batch.

    Args:
        lengths: Tokens of each row, longest first.
        most: Rows of a batch at most.
        pass_tokens: What a batch costs beside its tokens, in tokens.

    Returns:
        Where each batch ends, ascending.
    """
    least, starts = [0], [0]
    for end in range(1, len(lengths) + 1):
        cost, place = min(
            (least[start] + (end - start) * lengths[start] + pass_tokens, -start)
            for start in range(max(0, end - most), end)
        )
        least.append(cost)
        starts.append(-place)  # of equals the one with the larger batches first
    ends = [len(lengths)] if lengths else []
    while ends and starts[ends[0]] > 0:
        ends.insert(0, starts[ends[0]])
    return ends


@contextlib.contextmanager
def evaluating(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run a block without gradients, without dropout and with a random state of its own, and put all back."""
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, torch.no_grad(), evaluation_flags(model):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Batch:
    """Encoded prompts of similar length.

    Attributes:
        rows: Which prompts, as indices into the sequence they came from.
        input_ids: [B, T] int64, left padded.
        mask: [B, T] int64, 0 on the padding.
    """

    rows: tuple[int, ...]
    input_ids: Tensor
    mask: Tensor

    def repeated(self, copies: int) -> "Batch":
        """Return the batch several times over, one after the other."""
        return Batch(self.rows * copies, self.input_ids.repeat(copies, 1), self.mask.repeat(copies, 1))


class NextTokenReader:
    """Reads a model's next-token distributions, whatever hooks are on it.

    Only the last position's hidden state meets the head, so no [B, T, V] logits are ever formed (method
    §6.4).

    Args:
        model: A causal language model.
        chat: How prompts are rendered.
        batch_size: Prompts at a time.
    """

    def __init__(self, model: PreTrainedModel, chat: Chat, batch_size: int) -> None:
        self.model = model
        self.chat = chat
        self.batch_size = batch_size
        self.head = language_head(model)
        self._body = backbone(model)
        self._in_parts = InParts()
        self._pass_tokens = _PASS_TOKENS.get(model.device.type, _PASS_TOKENS["cuda"])
        self._takes_positions = "position_ids" in inspect.signature(self._body.forward).parameters

    @property
    def pad_id(self) -> int:
        """What fills the left of shorter rows, masked: the tokenizer's padding, else an end of turn."""
        pad_id = self.chat.tokenizer.pad_token_id
        return pad_id if isinstance(pad_id, int) else next(iter(self.end_ids), 0)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        return end_of_turn_ids(self.model, self.chat.tokenizer)

    def batches(self, prompts: Sequence[str], passes: int = 1) -> list[Batch]:
        """Encode prompts, longest first: if memory is short, it is so at once.

        Args:
            prompts: User messages.
            passes: How often the model will go through a batch until it is done, a sampled token being one pass.
                The fewer, the more it pays to leave out padding by smaller batches.
        """
        ids = self.chat.encode(prompts)
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        pass_tokens = passes * self._pass_tokens
        batches, start = [], 0
        for end in batch_ends([len(ids[row]) for row in order], self.batch_size, pass_tokens):
            rows = tuple(order[start:end])
            batches.append(Batch(rows, *left_pad([ids[row] for row in rows], self.pad_id, self.model.device)))
            start = end
        return batches

    def copies(self, batch: Batch) -> int:
        """How often a small batch may be repeated to fill a pass: beyond, tokens cost what they cost."""
        return max(1, _FULL_PASSES * self._pass_tokens // batch.input_ids.numel())

    def hidden(self, batch: Batch, positions: int = 1) -> Tensor:
        """Run the backbone, on the whole batch at once: hooks on the model may hold tensors of its size.

        Returns:
            The hidden states of the last `positions` positions, final norm applied, [B, positions, H].
        """
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask, "use_cache": False}
        if self._takes_positions:
            # As generate() counts them: with learned positions, left padding would shift a short prompt.
            inputs["position_ids"] = (batch.mask.cumsum(-1) - 1).clamp(min=0)
        hidden_BTH: Tensor = self._body(**inputs).last_hidden_state
        # A model spread over devices may end on another one than its head's.
        return hidden_BTH[:, -positions:].to(self.head.weight.device)

    def logits(self, batch: Batch) -> Tensor:
        """Return the next-token logits, [B, V] in the head's dtype."""
        return self.head.logits(self.hidden(batch)[:, -1])

    def sample(self, batch: Batch, tokens: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Continue each prompt by exactly `tokens` tokens, past any end of turn.

        Plain sampling: the checkpoint's own top-k, top-p and penalties are set aside. Temperature 0 is
        greedy. Each prompt has a sampling seed of its own, from `seed` and its place among all prompts, so that
        the batches do not matter; one whose keys and values do not fit into memory is continued in parts.

        Returns:
            The new tokens, [B, tokens] int64.
        """

        def continued(places: Sequence[int]) -> Tensor:
            output: Tensor = self.model.generate(  # type: ignore[operator]
                input_ids=batch.input_ids[list(places)],
                attention_mask=batch.mask[list(places)],
                max_new_tokens=tokens,
                min_new_tokens=0,
                do_sample=False,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                num_beams=1,
                num_return_sequences=1,
                # As an argument, unlike in a GenerationConfig, None means none and not the checkpoint's own.
                eos_token_id=None,
                pad_token_id=self.pad_id,
                use_cache=True,
                return_dict_in_generate=False,
                **sampling_options(temperature, [f"{seed}/{batch.rows[place]}" for place in places]),
            )
            return output[:, batch.input_ids.shape[1] :]

        with quick_head(unwrapped(self.model)):
            return torch.stack(self._in_parts(continued, range(len(batch.input_ids))))


def mean_probabilities(reader: NextTokenReader, prompts: Sequence[str]) -> Tensor:
    """Average the next-token distribution over prompts.

    Returns:
        [V] float64, on the CPU.
    """
    total: Tensor | None = None
    for batch in reader.batches(prompts):
        summed = torch.softmax(float64(reader.logits(batch)), dim=-1).sum(0).cpu()
        total = summed if total is None else total + summed
    assert total is not None, "callers check that there are prompts"
    return total / len(prompts)
