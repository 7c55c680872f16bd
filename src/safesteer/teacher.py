"""The safety teacher: the base model steered towards refusal, scoring the student's responses (method §2).

Every teacher returns the hidden states that the language-model head reads at the response's positions, so
that the divergence never needs the teacher's logits. Rows with `steered` False (harmless anchors, method
§6.7) are scored by the unsteered base model in the same forward pass.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from trl.models.utils import _ForwardRedirection

from safesteer.chat import Chat
from safesteer.errors import SafeSteerError
from safesteer.modeling import Head, backbone, language_head
from safesteer.steering import Steering


class Teacher(Protocol):
    """Who the student is distilled from."""

    def completion_hidden_states(
        self,
        student: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        steered: Tensor,
    ) -> Tensor:
        """Score responses.

        Args:
            student: The model in training, unwrapped; a teacher may share its weights.
            prompt_ids: [B, P], left padded.
            prompt_mask: [B, P], 1 for tokens, 0 for padding.
            completion_ids: [B, C], right padded.
            completion_mask: [B, C].
            steered: [B] bool; False rows are scored by the unsteered base model.

        Returns:
            [B, C, H] without gradient: position t is what the head reads to predict completion token t.
        """
        ...

    def head(self, student: nn.Module) -> Head:
        """Return the head that turns those hidden states into the teacher's logits."""
        ...


def completion_hidden_states(
    model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """Run a model's backbone over prompt and response and keep the positions that predict the response.

    Args:
        model: A causal language model, also under a `PeftModel`.
        prompt_ids: [B, P], left padded.
        prompt_mask: [B, P].
        completion_ids: [B, C], right padded.
        completion_mask: [B, C].

    Returns:
        [B, C, H], the final norm applied.
    """
    # The last token of the longest response predicts nothing that is scored.
    input_ids_BT = torch.cat([prompt_ids, completion_ids], dim=1)[:, :-1]
    mask_BT = torch.cat([prompt_mask, completion_mask], dim=1)[:, :-1]
    body = backbone(model)
    inputs = {"input_ids": input_ids_BT, "attention_mask": mask_BT, "use_cache": False}
    if "position_ids" in inspect.signature(body.forward).parameters:
        # As generate() counts them: with learned positions, left padding would otherwise shift a short
        # prompt.
        inputs["position_ids"] = (mask_BT.long().cumsum(-1) - 1).clamp(min=0)
    hidden_BTH: Tensor = body(**inputs).last_hidden_state
    return hidden_BTH[:, prompt_ids.size(1) - 1 :]


@contextlib.contextmanager
def evaluation_flags(model: nn.Module) -> Iterator[None]:
    """Turn dropout off for a block, and give every submodule its own training flag back afterwards.

    A plain `.eval()` on a module that teacher and student share would leave the student without dropout.
    """
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


class AdapterOffTeacher:
    """The student's own module with its adapter off and the steering hook on: no second copy of the weights.

    Args:
        steering: What turns the base model into the safety teacher; None leaves it unsteered.
        layer_path: Where the decoder layers are, if they cannot be found.
    """

    def __init__(self, steering: Steering | None, layer_path: str | None = None) -> None:
        self.steering = steering
        self.layer_path = layer_path

    @torch.no_grad()
    def completion_hidden_states(
        self,
        student: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        steered: Tensor,
    ) -> Tensor:
        """Score responses with the base weights (see `Teacher`)."""
        with (
            adapter_off(student),
            evaluation_flags(student),
            _steered(student, self.steering, self.layer_path, steered),
        ):
            return completion_hidden_states(student, prompt_ids, prompt_mask, completion_ids, completion_mask)

    @torch.no_grad()
    def head(self, student: nn.Module) -> Head:
        """Return the base model's head."""
        with adapter_off(student):
            return _detached(language_head(student))


class FrozenCopyTeacher:
    """A second copy of the base model, for full fine-tuning.

    Args:
        model: The copy, possibly wrapped by FSDP or DeepSpeed. It is set to evaluation mode and frozen.
        steering: What turns it into the safety teacher; None leaves it unsteered.
        layer_path: Where the decoder layers are, if they cannot be found.
    """

    def __init__(self, model: nn.Module, steering: Steering | None, layer_path: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.steering = steering
        self.layer_path = layer_path
        self._redirect = _ForwardRedirection()

    @torch.no_grad()
    def completion_hidden_states(
        self,
        student: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        steered: Tensor,
    ) -> Tensor:
        """Score responses with the copy (see `Teacher`); the student is not used."""
        unwrapped = self.unwrapped()
        with _steered(unwrapped, self.steering, self.layer_path, steered):
            # Through the wrapper's forward, so that FSDP and DeepSpeed gather the copy's shards (as TRL
            # does).
            hidden: Tensor = self._redirect(
                self.model,
                unwrapped,
                completion_hidden_states,
                unwrapped,
                prompt_ids,
                prompt_mask,
                completion_ids,
                completion_mask,
            )
        return hidden

    @torch.no_grad()
    def head(self, student: nn.Module) -> Head:
        """Return the copy's head."""
        return _detached(language_head(self.unwrapped()))

    def unwrapped(self) -> nn.Module:
        """Return the copy without FSDP's or DeepSpeed's wrapper."""
        unwrapped: nn.Module = extract_model_from_parallel(self.model)
        return unwrapped


class SystemPromptTeacher:
    """The unsteered base model with a safety system prompt in its prompt, not in the student's (method §2).

    The prompt is changed in token space: what the two renderings have in common at their end (the user's
    turn) is kept token for token, and what comes before it is replaced.

    Args:
        base: Where the base weights come from; its steering is left off.
        chat: How the student's prompts are rendered.
        system_prompt: The teacher's system prompt.
    """

    def __init__(self, base: AdapterOffTeacher | FrozenCopyTeacher, chat: Chat, system_prompt: str) -> None:
        self.base = base
        teacher_chat = dataclasses.replace(chat, system_prompt=system_prompt)
        self.student_prefix, self.teacher_prefix = _differing_prefixes(chat, teacher_chat)
        self.pad_id = int(chat.tokenizer.pad_token_id)

    def completion_hidden_states(
        self,
        student: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        steered: Tensor,
    ) -> Tensor:
        """Score responses to the prompt with the system prompt; anchors keep the student's prompt."""
        ids, mask = self.with_system_prompt(prompt_ids, prompt_mask, steered)
        nobody = torch.zeros_like(steered)
        return self.base.completion_hidden_states(student, ids, mask, completion_ids, completion_mask, nobody)

    def head(self, student: nn.Module) -> Head:
        """Return the base model's head."""
        return self.base.head(student)

    def with_system_prompt(
        self, prompt_ids: Tensor, prompt_mask: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Replace the rendered prefix in some rows.

        Args:
            prompt_ids: [B, P], left padded.
            prompt_mask: [B, P].
            rows: [B] bool; the rows that get the system prompt.

        Returns:
            ids and mask, both [B, P'], left padded.

        Raises:
            SafeSteerError: If a row does not begin with the chat's rendered prefix.
        """
        prompts: list[list[int]] = []
        for ids_P, mask_P, changed in zip(prompt_ids, prompt_mask, rows, strict=True):
            ids = ids_P[mask_P.bool()].tolist()
            if changed:
                cut = len(self.student_prefix)
                if tuple(ids[:cut]) != self.student_prefix:
                    raise SafeSteerError(
                        "a training prompt's rendering does not begin as other prompts' do, so the "
                        "teacher's system prompt cannot be put before it; strip special characters from its "
                        "start."
                    )
                ids = [*self.teacher_prefix, *ids[cut:]]
            prompts.append(ids)
        width = max(len(ids) for ids in prompts)
        padded = [[self.pad_id] * (width - len(ids)) + ids for ids in prompts]
        masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        return prompt_ids.new_tensor(padded), prompt_mask.new_tensor(masks)


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run a block on a `PeftModel`'s base weights; a model without adapter runs as it is."""
    with model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext():
        yield


def _steered(
    model: nn.Module, steering: Steering | None, layer_path: str | None, rows: Tensor
) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if steering is None else steering.applied(model, layer_path, rows)


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return Head(head.weight.detach(), bias, head.logit_scale, head.softcap)


def _differing_prefixes(chat: Chat, other: Chat) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find what two renderings of any prompt begin with where they differ: all but the common end."""
    pairs: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    probes: Sequence[str] = ("How are you?", "What is 2 + 2?", "List three colours.")
    for mine, theirs in zip(chat.encode(probes), other.encode(probes), strict=True):
        common = 0
        while common < min(len(mine), len(theirs)) and mine[-1 - common] == theirs[-1 - common]:
            common += 1
        pairs.add((tuple(mine[: len(mine) - common]), tuple(theirs[: len(theirs) - common])))
    if len(pairs) != 1 or not next(iter(pairs))[1]:
        raise SafeSteerError(
            "the chat template renders no system prompt of its own before the user's turn, so the teacher "
            "cannot be a system-prompt teacher; choose another teacher or a template with a system turn."
        )
    return next(iter(pairs))
