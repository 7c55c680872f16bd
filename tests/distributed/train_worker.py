"""One process of a training run for `test_two_processes`; started by torchrun."""

import json
import sys
from pathlib import Path

import torch

import tiny_training as tiny
from safesteer.trainer_callbacks import ProbeSets

folder, variant = Path(sys.argv[1]), sys.argv[2]
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
if run.accelerator.is_main_process:
    torch.save(gradients.steps[0], folder / "gradients.pt")
    (folder / "log.json").write_text(json.dumps(run.state.log_history))
