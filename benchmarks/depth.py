"""Depth localization: an optimizer step on the layers from the steered one on, beside one on all layers.

    python benchmarks/depth.py [--layers 20] [--hidden 512] [--completion 64]

A random Qwen3-shaped model, steered at 60 % of its depth, LoRA and full fine-tuning. Responses are given, not sampled: sampling
costs the same either way, and would hide the difference.
"""

import copy
import random
import tempfile
import time
from typing import Any

import torch
from measuring import figure, parser_of, random_qwen3, record
from peft import LoraConfig
from transformers import Qwen3ForCausalLM, TrainerCallback

from safesteer.chat import Chat
from safesteer.loading import load_tokenizer
from safesteer.prompts import load_prompts
from safesteer.steering import Steering
from safesteer.testbed.demo import testbed_folder
from safesteer.trainer import SafeSteerTrainer
from safesteer.trainer_config import SafeSteerConfig


class GivenResponses(SafeSteerTrainer):
    """Answers every prompt with random tokens of full length, at no cost."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        chance = random.Random(0)
        return [[chance.randrange(300, 3000) for _ in range(self.max_completion_length)] for _ in prompt_ids]


class StepTimes(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._started)


def step_seconds(model: Qwen3ForCausalLM, chat: Chat, layers: str, lora: bool, completion: int) -> float:
    """Median seconds of a step, the first left out."""
    harmful = load_prompts(testbed_folder() / "prompts" / "harmful_train.jsonl", count=32)
    depth = int(0.6 * model.config.num_hidden_layers)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        settings = SafeSteerConfig(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            max_completion_length=completion,
            max_steps=4,
            train_layers=layers,  # type: ignore[arg-type]
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        trainer = GivenResponses(
            copy.deepcopy(model),
            settings,
            harmful.prompts,
            None,
            chat,
            Steering(torch.randn(model.config.hidden_size), depth, 1.0),
            list(range(1000, 1050)),
            peft_config=LoraConfig(r=16, target_modules="all-linear") if lora else None,
            callbacks=[times],
        )
        trainer.train()
    return sorted(times.seconds[1:])[len(times.seconds[1:]) // 2]


def main() -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--completion", type=int, default=64)
    args = parser.parse_args()
    chat = Chat(load_tokenizer(str(testbed_folder() / "model")))
    model = random_qwen3(args.layers, args.hidden, args.vocabulary)
    size = {"layers": args.layers, "hidden": args.hidden, "vocabulary": args.vocabulary}
    entries = []
    for lora, name in ((True, "LoRA"), (False, "full fine-tuning")):
        seconds = {
            layers: step_seconds(model, chat, layers, lora, args.completion)
            for layers in ("from_steered", "all")
        }
        entries.append(
            figure(
                f"step from the steered layer on, {name}, against all layers",
                seconds["from_steered"],
                seconds["all"],
                "s",
                **size,
            )
        )
    record("depth", entries)


if __name__ == "__main__":
    main()
