"""Runs of the whole pipeline that take seconds: the planted model, which really refuses, and few prompts."""

import json
from pathlib import Path
from typing import Any

from planted_model import ANSWERED, HARMLESS, REFUSED, planted_model
from safesteer.recipes import build_settings
from safesteer.settings import Settings
from tiny_models import chatml_tokenizer


def write_inputs(folder: Path) -> None:
    """Write the model and the prompts into a folder: model/, harmful.json, harmless.json."""
    planted_model().save_pretrained(folder / "model")
    chatml_tokenizer().save_pretrained(folder / "model")
    (folder / "harmful.json").write_text(json.dumps([*REFUSED, *ANSWERED]))
    (folder / "harmless.json").write_text(json.dumps(HARMLESS))


def run_settings(inputs: Path, output: Path, **sections: dict[str, Any]) -> Settings:
    """Settings of a short run on those inputs, with some changed."""
    return build_settings(
        {
            "model": {"name": str(inputs / "model"), "device": "cpu"},
            "prompts": {"harmful": str(inputs / "harmful.json"), "harmless": str(inputs / "harmless.json")},
            "safety_tokens": {"samples": 2, "size": 10},
            "distillation": {
                "lora_rank": 2,
                "train_layers": "all",  # above the planted model's first layer all weights, and so all gradients, are zero
                "batch_size": 4,
                "micro_batch_size": 4,
                "steps": 4,
                "learning_rate": 1e-3,
                "max_completion_length": 6,
                "probe_steps": 0,
                "checkpoint_steps": 1,
            },
            "run": {"output": str(output)},
        },
        sections,
    )
