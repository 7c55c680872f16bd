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

from safesteer.chat import Chat, left_pad
from safesteer.errors import SafeSteerError
from safesteer.modeling import Head, backbone, evaluation_flags, language_head
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
        model: The copy, possibly wrapped by FSDP or DeepSpeed, or one of `teacher_copies`. It is set to
            evaluation mode and frozen.
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

    It scores the same response tokens, after another rendering of the same prompt.

    Args:
        base: Where the base weights come from; its steering is left off.
        chat: How the student's prompts are rendered.
        system_prompt: The teacher's system prompt, in place of any that `chat` has.
        prompts: All prompts that will be asked. They are rendered here rather than edited in token space,
            because some templates put the system prompt into the user's turn, where tokens may merge across
            the seam.
        max_prompt_length: How the student's prompts are cut; the teacher's are cut as late in the text.

    Raises:
        SafeSteerError: If the chat template leaves the system prompt out or refuses it.
    """

    def __init__(
        self,
        base: AdapterOffTeacher | FrozenCopyTeacher,
        chat: Chat,
        system_prompt: str,
        prompts: Sequence[str],
        max_prompt_length: int | None = None,
    ) -> None:
        self.base = base
        self._pad_id = int(chat.tokenizer.pad_token_id)
        with_system = dataclasses.replace(chat, system_prompt=system_prompt)
        without, rendered = (len(version.encode([""])[0]) for version in (chat, with_system))
        if with_system.render("") == chat.render(""):
            raise SafeSteerError(
                "the chat template leaves the system prompt out, so teacher system_prompt would teach "
                "nothing; choose another teacher or another chat template."
            )
        limit = None if max_prompt_length is None else max_prompt_length + rendered - without
        mine = chat.encode(prompts, max_length=max_prompt_length)
        theirs = with_system.encode(prompts, max_length=limit)
        self._with_system_prompt = {tuple(ids): other for ids, other in zip(mine, theirs, strict=True)}

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
        """Put the system prompt into some rows.

        Args:
            prompt_ids: [B, P], left padded.
            prompt_mask: [B, P].
            rows: [B] bool; the rows that get the system prompt.

        Returns:
            ids and mask, both [B, P'], left padded.

        Raises:
            SafeSteerError: If such a row is none of the prompts given at construction.
        """
        prompts: list[list[int]] = []
        for ids_P, mask_P, changed in zip(prompt_ids, prompt_mask, rows, strict=True):
            ids = ids_P[mask_P.bool()].tolist()
            if changed and tuple(ids) not in self._with_system_prompt:
                raise SafeSteerError(
                    "the system-prompt teacher was asked about a prompt it was not given at construction; "
                    "give it all training prompts."
                )
            prompts.append(self._with_system_prompt[tuple(ids)] if changed else ids)
        padded, mask = left_pad(prompts, self._pad_id, prompt_ids.device)
        return padded, mask.to(prompt_mask.dtype)


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
