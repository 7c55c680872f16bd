"""Short training runs; as a script, one process of them in shards by FSDP2, started by torchrun."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import tiny_training as tiny
from safesteer.trainer import SafeSteerTrainer
from safesteer.trainer_callbacks import ProbeSets

VARIANTS = ("full", "tied", "lora", "lora-head", "sampled")
RESUMED = ("full", "lora")


class _Sharded(SafeSteerTrainer):
    """Takes accelerate's FSDP path on CPUs too."""

    def __init__(self, model: Any, args: Any, *others: Any, **named: Any) -> None:
        if args.world_size > 1:
            # Accelerate turns FSDP on for accelerators only and silently runs DDP on CPUs. From here on nothing
            # depends on the kind of device.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(model, args, *others, **named)


class _ShardedFixedResponses(tiny.FixedResponses, _Sharded):
    pass


def _trainer(folder: Path, variant: str) -> SafeSteerTrainer:
    student = tiny.model(seed=2, tie_word_embeddings=variant == "tied")
    settings: dict[str, Any] = {}
    if variant == "sampled":
        # Some responses end at once and some late, so that one process has more tokens to sample.
        with torch.no_grad():
            student.lm_head.weight[tiny.chat().tokenizer.eos_token_id] *= 30
        settings = {
            "generation_kwargs": {"do_sample": False},
            "max_completion_length": 24,
            "probe_steps": 2,
            "probe_tokens": 2,
            "arguments": {"probe": ProbeSets(tiny.HARMFUL[:3], tiny.HARMLESS[:1])},
        }
    adapter = {"lora": tiny.lora(), "lora-head": tiny.lora(modules_to_save=["lm_head"])}
    run = tiny.trainer(
        folder,
        cls=_Sharded if variant == "sampled" else _ShardedFixedResponses,
        student=student,
        peft_config=adapter.get(variant),
        per_device_train_batch_size=2 // tiny.settings(folder).world_size,
        gradient_accumulation_steps=1 if variant == "sampled" else 2,
        anchor_fraction=0.5,
        train_layers="all" if variant in ("tied", "lora-head") else "from_steered",
        max_steps=2,
        warmup_steps=0,
        save_strategy="steps",
        save_steps=1,
        # Adam's steps are otherwise as large for gradients that are nothing but rounding.
        adam_epsilon=1e-3,
        learning_rate=0.1,
        **settings,
    )
    if variant.startswith("lora"):
        tiny.jolt(run.model)  # an adapter that is still zero has no gradient in one of its factors
    return run


def train(folder: Path, variant: str) -> tuple[list[dict[str, Any]], bool]:
    """Train two steps, and save what they made to `folder / "model"`.

    Returns:
        The log, and whether the model was in shards.
    """
    run = _trainer(folder, variant)
    run.train()
    run.save_model(str(folder / "model"))
    return run.state.log_history, any(isinstance(weight, DTensor) for weight in run.model.parameters())


def resume(folder: Path, variant: str) -> None:
    """Train the second step again from the first one's checkpoint, and save to `folder / "resumed"`."""
    run = _trainer(folder, variant)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    run.save_model(str(folder / "resumed"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    results = {variant: train(root / variant, variant) for variant in VARIANTS}
    for name in RESUMED:
        resume(root / name, name)
    if torch.distributed.get_rank() == 0:
        torch.save(results, root / "results.pt")
    torch.distributed.destroy_process_group()
