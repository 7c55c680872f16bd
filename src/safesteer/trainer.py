"""Localized on-policy distillation from the safety teacher (method §4), on `trl.DistillationTrainer`.

TRL samples the student's responses, cuts them into microbatches, drives optimizer, checkpoints and trackers.
This module supplies the teacher and the loss.

TRL reports anonymous usage statistics unless the environment has `HF_HUB_DISABLE_TELEMETRY=1` (or
`HF_HUB_OFFLINE=1`) before Python starts. Nothing here changes that setting; of this trainer TRL would report
its own name as "other".
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl import DistillationTrainer
from trl.models import prepare_deepspeed

from safesteer.chat import Chat
from safesteer.direction import RefusalDirection
from safesteer.divergence import localized_divergence
from safesteer.errors import SafeSteerError
from safesteer.few_rows import quick_head
from safesteer.lower_layers import LowerLayers, can_share
from safesteer.modeling import evaluation_flags, head_gathered, language_head, unwrapped
from safesteer.out_of_memory import InParts
from safesteer.safety_tokens import SafetyTokens
from safesteer.sampling import samples_plainly, sampling_by_row
from safesteer.steering import Steering
from safesteer.teacher import (
    AdapterOffTeacher,
    FrozenCopyTeacher,
    SystemPromptTeacher,
    Teacher,
    completion_hidden_states,
)
from safesteer.teacher_copies import copy_of_kind
from safesteer.teacher_ema import EmaTeacher, load_teacher, save_teacher
from safesteer.trainable_layers import (
    adapter_from,
    adapter_of_decoder,
    first_trained_layer,
    freeze_below,
    remove_adapters_below,
)
from safesteer.trainer_callbacks import (
    FiniteGradients,
    ProbeCallback,
    ProbeSets,
    Refresh,
    TeacherCallback,
    not_finite,
    sampling_seed,
)
from safesteer.trainer_checks import check_fit
from safesteer.trainer_config import SafeSteerConfig
from safesteer.trainer_statistics import averages, sum_by_kind
from safesteer.training_data import arrange_training_prompts, counted_tokens, number_of_steps, without_padding


class SafeSteerTrainer(DistillationTrainer):  # type: ignore[misc, unused-ignore]
    """Distil the safety teacher into the student, on the student's own responses, at the safety tokens.

    Args:
        model: The chat model to align, in training precision; its weights (or its new adapter) are changed in
            place.
        args: Settings.
        harmful: The harmful prompts, as the user would type them.
        harmless: Harmless prompts, needed when `args.anchor_fraction` is above 0.
        chat: How prompts are rendered.
        direction: The refusal direction or any other steering; None only for the system-prompt teacher.
        safety_tokens: `S`; None only for vocabularies other than safety_tokens.
        peft_config: The LoRA adapter to train; None trains the model's own weights (or the adapter it already
            has).
        probe: Prompts on which refusal rates are watched, if `args.probe_steps` is above 0.
        layer_path: Where the decoder layers are, if they cannot be found.
        refresh: For teacher ema: finds direction and safety tokens anew, every `args.refresh_steps`.
        callbacks: Further callbacks of transformers.

    Attributes:
        teacher: The teacher in use.
        probe_callback: Holds the probe's `results`; None without probe.

    Raises:
        SafeSteerError: If settings, model and arguments do not fit together.
    """

    _tag_names = ["trl", "distillation", "safesteer"]
    _name = "SafeSteer"

    args: SafeSteerConfig
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SafeSteerConfig,
        harmful: Sequence[str],
        harmless: Sequence[str] | None,
        chat: Chat,
        direction: RefusalDirection | Steering | None,
        safety_tokens: SafetyTokens | Sequence[int] | None,
        peft_config: PeftConfig | None = None,
        probe: ProbeSets | None = None,
        *,
        layer_path: str | None = None,
        refresh: Refresh | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.chat = chat
        self.teacher: Teacher
        self.probe_callback: ProbeCallback | None = None
        self._layer_path = layer_path
        self._in_parts = InParts()
        steering = direction.steering if isinstance(direction, RefusalDirection) else direction
        check_fit(
            model, args, steering, peft_config, has_refresh=refresh is not None, has_probe=probe is not None
        )
        self._first_layer = first_trained_layer(model, args, steering, peft_config)
        if peft_config is not None:
            peft_config = adapter_of_decoder(peft_config, model, layer_path)
        if self._first_layer is not None:
            if peft_config is not None:
                peft_config = adapter_from(peft_config, model, self._first_layer, layer_path)
            else:
                freeze_below(model, self._first_layer, layer_path)
        args = copy.copy(args)
        batch_size = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        if args.max_steps <= 0:
            args.max_steps = number_of_steps(
                len(harmful), batch_size, args.anchor_fraction, args.num_train_epochs
            )
        prompts = arrange_training_prompts(
            harmful,
            harmless,
            batch_size=batch_size,
            anchor_fraction=args.anchor_fraction,
            steps=args.max_steps,
            seed=args.seed,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=prompts,
            processing_class=chat.tokenizer,
            peft_config=peft_config,
            callbacks=[FiniteGradients(), *callbacks],
        )
        if self._first_layer is not None and peft_config is not None:
            remove_adapters_below(self.model, self._first_layer, layer_path)
        self.set_token_ids(safety_tokens.ids if isinstance(safety_tokens, SafetyTokens) else safety_tokens)
        self.teacher = self._make_teacher(steering, harmful)
        self._lower_layers = LowerLayers(self._shared_layers(), layer_path)
        self._sums: Tensor | None = None
        if isinstance(self.teacher, EmaTeacher):
            self.add_callback(TeacherCallback(self, self.teacher, refresh))
        if probe is not None and args.probe_steps:
            self.probe_callback = ProbeCallback(self, probe)
            self.add_callback(self.probe_callback)

    def set_token_ids(self, ids: Sequence[int] | None) -> None:
        """Set the safety tokens `S` that the divergence looks at.

        Raises:
            SafeSteerError: If a token is not in the model's vocabulary, or there are none.
        """
        self.token_ids: Tensor | None = None
        if ids is None and self.args.vocabulary != "safety_tokens":
            return
        size = language_head(self.model).weight.shape[0]
        if not ids or not all(0 <= token < size for token in ids) or len(set(ids)) != len(ids):
            raise SafeSteerError(
                f"the {len(ids or ())} safety tokens must be distinct ids below the vocabulary size {size} "
                "and at least one; find them on this model, or set vocabulary to teacher_top_k or full."
            )
        self.token_ids = torch.tensor(list(ids), device=self.accelerator.device)

    def _make_teacher(self, steering: Steering | None, harmful: Sequence[str]) -> Teacher:
        args, path = self.args, self._layer_path
        kind = args.teacher
        if kind == "ema":
            if self.is_fsdp_enabled:
                raise SafeSteerError(
                    "teacher ema cannot follow a student that FSDP divides among devices; choose adapter_off or "
                    "frozen_copy."
                )
            return EmaTeacher(self._copy(self.model), steering, args.ema_rate, path)
        with_adapter = isinstance(self.model, PeftModel)
        steering = None if kind == "system_prompt" else steering
        base: AdapterOffTeacher | FrozenCopyTeacher
        if with_adapter and kind != "frozen_copy":
            base = AdapterOffTeacher(steering, path)
        else:
            base = FrozenCopyTeacher(self._copy(self.model, with_adapter=False), steering, path)
        if kind == "system_prompt":
            return SystemPromptTeacher(
                base, self.chat, args.teacher_system_prompt, harmful, args.max_prompt_length
            )
        return base

    def _shared_layers(self) -> int:
        """Count the layers on which teacher and student agree throughout training, to compute them once."""
        if self._first_layer is None or not self.args.share_lower_layers or not can_share(self.model):
            return 0
        if isinstance(self.teacher, EmaTeacher) or not isinstance(
            self.teacher, AdapterOffTeacher | FrozenCopyTeacher
        ):
            return 0  # another direction later, or another prompt
        return self._first_layer

    def _copy(self, model: nn.Module, with_adapter: bool = True) -> nn.Module:
        """Copy the model and prepare the copy for FSDP or DeepSpeed, as TRL prepares its teacher.

        Raises:
            SafeSteerError: If a copy of the kind that `teacher_copy` asks for cannot be made of this model.
        """
        kind = self.args.teacher_copy
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        second: Any = copy_of_kind(kind, model, self.accelerator.device, self._layer_path, sharded=sharded)
        if isinstance(second, PeftModel) and not with_adapter:
            # Off for good; PEFT's unload() would keep modules that the adapter has replaced and trained.
            base: Any = second.base_model
            base.disable_adapter_layers()
        second.eval().requires_grad_(False)
        if kind != "same":
            placed: nn.Module = second  # where it belongs; preparing would move weights that wait elsewhere
            return placed
        prepared: nn.Module
        if self.is_deepspeed_enabled:
            prepared = prepare_deepspeed(second, self.accelerator)
        elif self.accelerator.is_fsdp2:
            # As the student is; in evaluation mode `prepare_model` would leave a whole copy on every device.
            prepared = fsdp2_prepare_model(self.accelerator, second)
        else:
            prepared = self.accelerator.prepare_model(second, evaluation_mode=True)
        return prepared

    # ---- sampling ------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "steered"]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self.chat.encode(prompts, max_length=self.args.max_prompt_length), None, {}

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        # Seeded by step, so that a resumed run samples the responses the interrupted one would have sampled.
        seed = (self.args.seed, self.state.global_step, self.accelerator.process_index)
        with sampling_seed(self.accelerator.device, *seed):
            inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        return inputs

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        whole = super()._generate_single_turn
        by_row = not self.use_vllm and samples_plainly(self.generation_config, self.args.generation_kwargs)
        # A seed for every row, so that a batch done in halves gives the responses of the whole.
        place = f"{self.args.seed}/{self.state.global_step}/{self.accelerator.process_index}"

        def sample(rows: Sequence[tuple[int, list[int]]]) -> list[list[int]]:
            seeds = [f"{place}/{row}" for row, _ in rows]
            with sampling_by_row(self.model, self.args.temperature, seeds) if by_row else nullcontext():
                completions: list[list[int]] = whole([ids for _, ids in rows], *args, **kwargs)
            return completions

        # TRL samples in train mode: dropout would sample from another model than the one to be aligned.
        with evaluation_flags(self.model), quick_head(unwrapped(self.model)):
            return self._in_parts(sample, list(enumerate(prompt_ids)))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Sample responses, and give each of their tokens its weight in the optimizer step's loss.

        The weights are settled here, where the whole step's responses are known, and then shuffled and split
        with them; so accumulating microbatches or adding processes does not change the loss.
        """
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        device = self.accelerator.device
        output["steered"] = torch.tensor([bool(row.get("steered", True)) for row in inputs], device=device)
        weights = counted_tokens(
            output["completion_mask"], self.args.first_tokens, self.args.skip_tokens
        ).float()
        if self.args.reduction == "response":
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        total = weights.sum()
        if self.model.training:
            # DDP averages gradients over processes, so each process's share is taken of an average process.
            total = self.accelerator.reduce(total, reduction="mean")
        output["loss_weights"] = weights / total.clamp(min=torch.finfo(total.dtype).tiny)
        return output

    # ---- loss ----------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute a microbatch's share of the step's loss, and log when the step is complete.

        Raises:
            SafeSteerError: If the loss is not finite on any process.
        """
        student = self.accelerator.unwrap_model(model)
        # As TRL, through the wrapper's forward: DDP prepares its backward pass there, FSDP gathers its
        # shards. The redirection leaves out the forward that accelerate has put autocast around, so it is put here.
        with self.accelerator.autocast():
            loss, sums = self._forward_redirection(
                model, student, self._compute_loss, student, inputs, num_items_in_batch
            )
        losses = self.accelerator.gather(loss.detach().reshape(1))
        if not torch.isfinite(losses).all():
            bad = losses[~torch.isfinite(losses)][0]
            raise not_finite("loss", bad, self.state.global_step + 1, self.args.output_dir)
        self._sums = sums if self._sums is None else self._sums + sums
        mode = "train" if self.model.training else "eval"
        if mode == "eval" or (self._step + 1) % self.args.gradient_accumulation_steps == 0:
            for name, value in averages(self._sums, self.accelerator).items():
                self._metrics[mode][name].append(value)
            self._sums = None
        return (loss, None) if return_outputs else loss

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor]:
        """Score a microbatch's responses with teacher and student and compare them at the counted tokens.

        Args:
            unwrapped_student: The model in training.
            inputs: prompt_ids [B, P], completion_ids [B, C], their masks, steered [B], loss_weights [B, C].
            num_items_in_batch: Not used, because the weights already count the whole step.

        Returns:
            The microbatch's share of the loss, [], and `sum_by_kind`'s statistics.
        """
        ids = without_padding(
            inputs["prompt_ids"], inputs["prompt_mask"], inputs["completion_ids"], inputs["completion_mask"]
        )
        steered_B, weights_BC = inputs["steered"], inputs["loss_weights"][:, : ids[2].size(1)]
        # The teacher first: PEFT toggles requires_grad around it, and the student's graph must not see that.
        teacher = self.teacher
        owner = teacher.base if isinstance(teacher, SystemPromptTeacher) else teacher
        base = owner.unwrapped() if isinstance(owner, FrozenCopyTeacher) else unwrapped_student
        with self._lower_layers.recorded(base):
            teacher_BCH = teacher.completion_hidden_states(unwrapped_student, *ids, steered_B)
        with self._lower_layers.reused(unwrapped_student):
            student_BCH = completion_hidden_states(unwrapped_student, *ids)
        # Once for all chunks, and for both models where they share the head.
        with head_gathered(unwrapped_student), head_gathered(base):
            teacher_head = teacher.head(unwrapped_student)
            student_head = language_head(unwrapped_student)

            device = student_head.weight.device
            chosen_BC = weights_BC > 0
            if not chosen_BC.any():
                chosen_BC[0, 0] = True  # with weight 0: every process needs a loss to differentiate
            weights_N = weights_BC[chosen_BC].to(device)
            output = localized_divergence(
                student_BCH[chosen_BC].to(device),
                teacher_BCH[chosen_BC].to(device),
                student_head,
                teacher_head,
                weights_N,
                token_ids=self.token_ids,
                vocabulary=self.args.vocabulary,
                support=self.args.support,
                beta=self.args.beta,
                top_k=self.args.teacher_top_k,
                temperature=self.temperature,
                chunk_size=self.args.divergence_chunk_size,
            )
        steered_N = steered_B[:, None].expand_as(chosen_BC)[chosen_BC].to(device)
        return output.loss, sum_by_kind(output, steered_N, weights_N > 0)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the rest, because a checkpoint counts as complete when its trainer state is there.
        if isinstance(self.teacher, EmaTeacher) and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            save_teacher(folder, self.teacher, self.accelerator.unwrap_model(model), self.token_ids)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if isinstance(self.teacher, EmaTeacher) and checkpoint is not None:
            self.token_ids = load_teacher(Path(checkpoint), self.teacher, self.accelerator.device)
