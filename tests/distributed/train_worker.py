"""A short training run; as a script, one process of it, started by torchrun."""

import sys
from pathlib import Path
from typing import Any

import torch

import tiny_training as tiny
from safesteer.trainer_callbacks import ProbeSets

VARIANTS = ("full-response", "lora-token")


def train(folder: Path, variant: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Train two steps of four prompts over however many processes there are.

    Returns:
        The first step's gradients, and the log.
    """
    model, reduction = variant.split("-")
    gradients = tiny.Gradients()
    processes = tiny.settings(folder).world_size
    run = tiny.trainer(
        folder,
        cls=tiny.FixedResponses,
        peft_config=tiny.lora() if model == "lora" else None,
        per_device_train_batch_size=2 // processes,
        gradient_accumulation_steps=2,
        reduction=reduction,
        anchor_fraction=0.5,
        max_steps=2,
        max_grad_norm=0.0,
        warmup_steps=0,
        probe_steps=1,
        probe_tokens=2,
        arguments={"callbacks": [gradients], "probe": ProbeSets(tiny.HARMFUL[:3], tiny.HARMLESS[:1])},
    )
    if model == "lora":
        tiny.jolt(run.model)  # an adapter that is still zero has no gradient in one of its factors
    run.train()
    return gradients.steps[0], run.state.log_history


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {variant: train(Path(sys.argv[1]), variant) for variant in VARIANTS}
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    torch.distributed.destroy_process_group()
