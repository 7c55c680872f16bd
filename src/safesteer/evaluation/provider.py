"""Inspect's model provider "safesteer": models in this process, with LoRA adapters and steering, in batches.

`inspect eval safesteer/advbench --model safesteer/runs/qwen3 -M which=aligned`. A request's text is exactly what
`safesteer.chat.generate` gives for the same prompt. Requests are batched as they come, with left padding; padding
changes the last bits of a logit, so that in rare near-ties a greedy token may depend on the batch, as it does with
every batched generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from safesteer.chat import Response, generating, length_sorted_batches
from safesteer.errors import SafeSteerError
from safesteer.evaluation.batching import Batcher
from safesteer.evaluation.subjects import Role, Subject, subjects_of

_DEFAULT_TOKENS = 256
# Requests at a time: many, because the longer the queue, the more alike the lengths within a batch.
_CONNECTIONS = 1024


@dataclass(frozen=True)
class _Request:
    ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int


@modelapi(name="safesteer")
class SafeSteerModel(ModelAPI):
    """A model, an adapter, or a part of a run.

    Args:
        model_name: A run's folder, a model's folder or a hub id; of no effect with `subject`.
        base_url: Unused, as is `api_key`.
        api_key: Unused.
        config: Inspect's.
        which: Of a run: "base", "teacher" or "aligned"; by default the last of these that it has.
        batch_size: Prompts at a time.
        subject: A model that is in memory already.
        **model_args: `device`, `dtype` and `thinking`, as for `subjects_of`.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        which: Role | None = None,
        batch_size: int = 32,
        subject: Subject | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if subject is None:
            subject = subjects_of(model_name, None if which is None else (which,), **model_args)[-1]
        self.subject = subject
        self._batch_size = batch_size
        self._batcher = Batcher(self._respond, self._batches)

    def max_connections(self) -> int:
        """Return how many samples may wait for the model at a time."""
        return _CONNECTIONS

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one prompt; a message of the assistant's at the end is a prefill that is continued."""
        if tools:
            raise SafeSteerError("the safesteer provider calls no tools; use another provider for agents.")
        request = _Request(
            ids=self._encoded(input),
            max_new_tokens=config.max_tokens or _DEFAULT_TOKENS,
            temperature=config.temperature or 0.0,
            seed=config.seed or 0,
        )
        response = await self._batcher.submit(request)
        usage = ModelUsage(
            input_tokens=len(request.ids),
            output_tokens=response.tokens,
            total_tokens=len(request.ids) + response.tokens,
        )
        cut = response.tokens >= request.max_new_tokens
        choice = ChatCompletionChoice(
            message=ChatMessageAssistant(content=response.text, model=self.model_name, source="generate"),
            stop_reason="max_tokens" if cut else "stop",
        )
        return ModelOutput(model=self.model_name, choices=[choice], usage=usage)

    def _encoded(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        chat, rest = self.subject.chat, list(messages)
        if rest and rest[0].role == "system":
            chat = replace(chat, system_prompt=rest.pop(0).text)
        prefill = rest.pop().text if rest and rest[-1].role == "assistant" else ""
        if [message.role for message in rest] != ["user"]:
            raise SafeSteerError(
                f"the safesteer provider answers one user turn, not a conversation of {len(messages)} messages; use "
                "another provider."
            )
        return tuple(chat.encode([rest[0].text], prefills=[prefill])[0])

    def _batches(self, requests: Sequence[_Request]) -> list[list[int]]:
        """Group requests of one way of decoding and of similar length."""
        groups: dict[tuple[int, float], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault((request.max_new_tokens, request.temperature), []).append(index)
        return [
            [group[place] for place in batch]
            for group in groups.values()
            for batch in length_sorted_batches(
                [len(requests[index].ids) for index in group], self._batch_size
            )
        ]

    def _respond(self, requests: Sequence[_Request]) -> list[Response]:
        subject, first = self.subject, requests[0]
        length, temperature = first.max_new_tokens, first.temperature
        with (
            subject.steering(),
            generating(
                subject.model, subject.chat, max_new_tokens=length, temperature=temperature
            ) as respond,
        ):
            return respond([request.ids for request in requests], [request.seed for request in requests])
