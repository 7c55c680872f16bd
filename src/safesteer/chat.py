"""Chat templates: prompts to tokens, post-instruction tokens, left-padded batches, generated responses."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from safesteer.artifacts import fingerprint
from safesteer.choices import Thinking
from safesteer.errors import SafeSteerError, one_line
from safesteer.few_rows import quick_head
from safesteer.modeling import unwrapped
from safesteer.out_of_memory import InParts
from safesteer.sampling import Seed, sampling_options

# Llama-3.1 and later open every system turn with these two lines, the second of which changes daily.
_DATE_LINES = re.compile(r"Cutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n\n?")
_EMPTY_SYSTEM_TURN = re.compile(r"<\|start_header_id\|>system<\|end_header_id\|>\s*<\|eot_id\|>")
# They end in four different characters, so no token that holds a character of the user's is common to all.
_PROBES = ("What is the capital of France?", "Write a poem about the sea", "2 + 2 = 4.", "Name a colour: RED")


@dataclass(frozen=True, eq=False)
class Chat:
    """How prompts are put to a model: one user turn, perhaps a system prompt, the generation prompt added.

    Attributes:
        tokenizer: With a chat template (see `load_tokenizer`).
        system_prompt: Put before the user's turn; None leaves it to the template, which may have one of its
            own.
        thinking: Whether a model that can think before it answers shall. "off" passes `enable_thinking=False`
            to a template that knows the variable; Qwen3's then ends with an empty think block.
        template_kwargs: More variables for the template; they win over `thinking`.
        drop_date_lines: Leave out the "Cutting Knowledge Date" and "Today Date" lines of Llama-3.1 and later,
            as the authors do (method §4), and the system turn with them when nothing else is in it.
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    thinking: Thinking = "off"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    drop_date_lines: bool = True

    @property
    def fingerprint(self) -> str:
        """Hash of what decides how a prompt is rendered and tokenised."""
        tokenizer = self.tokenizer
        return fingerprint(
            {
                "template": tokenizer.get_chat_template(),
                "vocabulary": sorted(tokenizer.get_vocab().items()),
                "system_prompt": self.system_prompt,
                "thinking": self.thinking,
                "template_kwargs": {name: repr(value) for name, value in self.template_kwargs.items()},
                "drop_date_lines": self.drop_date_lines,
            }
        )

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """Return the conversation that asks `prompt`: the system turn if there is one, and the user's."""
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": prompt}]

    def render(self, prompt: str) -> str:
        """Return the text whose continuation is the model's response.

        Raises:
            SafeSteerError: If the chat template is faulty or refuses the system prompt.
        """
        template = self.tokenizer.get_chat_template()
        variables: dict[str, Any] = {}
        if re.search(r"\benable_thinking\b", template):
            variables["enable_thinking"] = self.thinking == "on"
        variables.update(self.template_kwargs)
        try:
            text = self.tokenizer.apply_chat_template(
                self.messages(prompt), tokenize=False, add_generation_prompt=True, **variables
            )
        except (TemplateError, ValueError, TypeError) as error:
            remedy = "fix the template" if self.system_prompt is None else "leave the system prompt out"
            raise SafeSteerError(
                f"the chat template of {_name(self.tokenizer)} cannot render a prompt ({one_line(error)}); "
                f"{remedy} or give another with --chat-template."
            ) from error
        return self._without_date_lines(cast(str, text), template)

    def encode(
        self,
        prompts: Sequence[str],
        *,
        max_length: int | None = None,
        prefills: Sequence[str] | None = None,
    ) -> list[list[int]]:
        """Render and tokenise prompts, without adding a second beginning-of-sequence token.

        Args:
            prompts: The users' texts.
            max_length: In tokens, the template's included. A longer prompt loses the end of the user's text,
                never the template around it.
            prefills: What each response is to begin with, put after the generation prompt; nothing by default.

        Returns:
            Token ids per prompt, unpadded.

        Raises:
            SafeSteerError: If `max_length` leaves no room for any of the user's text.
        """
        if not prompts:
            return []
        prefills = [""] * len(prompts) if prefills is None else prefills
        asked = list(zip(prompts, prefills, strict=True))
        ids = self._tokenize([self.render(prompt) + prefill for prompt, prefill in asked])
        if max_length is None:
            return ids
        return [
            row if len(row) <= max_length else self._truncated(prompt, prefill, max_length)
            for row, (prompt, prefill) in zip(ids, asked, strict=True)
        ]

    @functools.cached_property
    def post_instruction_ids(self) -> tuple[int, ...]:
        """The template's tokens after the user's text: where the model has read all of it (method §1).

        Raises:
            SafeSteerError: If the template adds nothing after the user's text.
        """
        rows = self._tokenize([self.render(probe) for probe in _PROBES])
        common = 0
        while common < min(map(len, rows)) and len({row[-1 - common] for row in rows}) == 1:
            common += 1
        if common == 0:
            raise SafeSteerError(
                f"the chat template of {_name(self.tokenizer)} adds no token after the user's text, so there "
                "is no place to read the model's intention; give a template with a generation prompt with "
                "--chat-template."
            )
        return tuple(rows[0][-common:])

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        # The template writes the beginning-of-sequence token itself, where there is one.
        encoding = self.tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False)
        return [list(row) for row in cast(list[list[int]], encoding["input_ids"])]

    def _truncated(self, prompt: str, prefill: str, max_length: int) -> list[int]:
        """Encode the longest beginning of `prompt` that fits, found by bisection over its characters."""
        fits, too_long = 0, len(prompt)
        best: list[int] | None = None
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            row = self._tokenize([self.render(prompt[:middle]) + prefill])[0]
            if len(row) <= max_length:
                fits, best = middle, row
            else:
                too_long = middle
        if best is None:
            template_length = len(self._tokenize([self.render("") + prefill])[0])
            raise SafeSteerError(
                f"a prompt of at most {max_length} tokens has no room for the user's text, since the chat "
                f"template takes {template_length}; raise the maximum prompt length."
            )
        return best

    def _without_date_lines(self, text: str, template: str) -> str:
        if not self.drop_date_lines or "Cutting Knowledge Date" not in template:
            return text
        # The first match is the template's own, since it stands before anything a prompt can say.
        without = _DATE_LINES.sub("", text, count=1)
        return without if self.system_prompt else _EMPTY_SYSTEM_TURN.sub("", without, count=1)


def left_pad(
    ids: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Batch rows of token ids so that they all end at the last column.

    Returns:
        Input ids and attention mask, both [B, T] int64.
    """
    width = max((len(row) for row in ids), default=0)
    input_ids = [[pad_id] * (width - len(row)) + list(row) for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    shape = (len(ids), width)
    return (
        torch.tensor(input_ids, dtype=torch.int64, device=device).reshape(shape),
        torch.tensor(mask, dtype=torch.int64, device=device).reshape(shape),
    )


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the token ids that end a response, the tokenizer's and the generation config's, sorted."""
    configured = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    ids = set(configured if isinstance(configured, (list, tuple)) else [configured])
    return tuple(sorted(int(token) for token in ids | {tokenizer.eos_token_id} if token is not None))


def generate(
    model: PreTrainedModel,
    chat: Chat,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    max_length: int | None = None,
) -> list[str]:
    """Generate one response per prompt with `model.generate`, hooks and adapters in effect.

    The checkpoint's own sampling defaults (top-k, top-p, penalties) are set aside: temperature is all there
    is. The global random state plays no part.

    Args:
        model: A causal language model; it is put in evaluation mode meanwhile.
        chat: How to ask.
        prompts: The users' texts.
        max_new_tokens: Longest response.
        batch_size: Prompts at a time, of similar length; fewer when they do not fit into memory.
        temperature: 0 is greedy; otherwise pure sampling at that temperature.
        seed: Of the sampling; the same seed and prompts give the same responses, whatever the batch size.
        max_length: Longest prompt in tokens (see `Chat.encode`).

    Returns:
        Responses in the order of the prompts, special tokens stripped.
    """
    ids = chat.encode(prompts, max_length=max_length)
    responses = [""] * len(ids)
    with generating(model, chat, max_new_tokens=max_new_tokens, temperature=temperature) as respond:
        for batch in length_sorted_batches(list(map(len, ids)), batch_size):
            found = respond([ids[index] for index in batch], [f"{seed}/{index}" for index in batch])
            for index, response in zip(batch, found, strict=True):
                responses[index] = response.text
    return responses


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group rows of similar length, longest first: if memory is short, it is so at once.

    Returns:
        Indices into `lengths`, `batch_size` at a time.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Response:
    """What a model generated.

    Attributes:
        text: Without special tokens.
        tokens: How many, the end of turn included.
    """

    text: str
    tokens: int


@contextlib.contextmanager
def generating(
    model: PreTrainedModel, chat: Chat, *, max_new_tokens: int, temperature: float = 0.0
) -> Iterator[Callable[[Sequence[Sequence[int]], Sequence[Seed]], list[Response]]]:
    """Set a model up for plain decoding for the length of a block, and put everything back.

    Args:
        model: As for `generate`.
        chat: Whose tokenizer pads and decodes.
        max_new_tokens: Longest response.
        temperature: 0 is greedy; otherwise pure sampling at that temperature.

    Yields:
        What makes a batch of token ids (unpadded rows), with a sampling seed for each, into responses; in
        smaller batches when the whole does not fit into memory.
    """
    ends = end_of_turn_ids(model, chat.tokenizer)
    pad_id = chat.tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        pad_id = ends[0] if ends else 0
    inner = unwrapped(model)
    device = inner.device
    was_training, checkpoint_config = model.training, inner.generation_config

    in_parts = InParts()

    def answer(rows: Sequence[tuple[Sequence[int], Seed]]) -> list[Response]:
        input_ids, mask = left_pad([ids for ids, _ in rows], pad_id, device)
        options = sampling_options(temperature, [seed for _, seed in rows])
        with torch.no_grad(), quick_head(inner):
            output = inner.generate(input_ids=input_ids, attention_mask=mask, **options)
        return [_response(chat.tokenizer, row, ends) for row in output[:, input_ids.shape[1] :].tolist()]

    def respond(ids: Sequence[Sequence[int]], seeds: Sequence[Seed]) -> list[Response]:
        return in_parts(answer, list(zip(ids, seeds, strict=True)))

    model.train(False)
    # `generate` fills in what a config leaves unset from the model's own: its top-k, its penalties.
    inner.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(ends) or None, pad_token_id=pad_id
    )
    try:
        yield respond
    finally:
        inner.generation_config = checkpoint_config
        model.train(was_training)


def _response(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: tuple[int, ...]) -> Response:
    """Decode what stands before the first end of turn."""
    length = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    text = cast(str, tokenizer.decode(ids[:length], skip_special_tokens=True))
    return Response(text, min(length + 1, len(ids)))


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
