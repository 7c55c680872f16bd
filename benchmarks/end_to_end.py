"""`align` beside a plain PyTorch pipeline that does the same job the straightforward way: time and peak memory.

    python benchmarks/end_to_end.py [--hidden 512] [--layers 12] [--completion 32]

A random Qwen3-shaped model (over 100 M parameters, the real vocabulary of 151,936), 100 harmful prompts. Each pipeline runs in
a process of its own, one after the other. The reference holds two full models, searches directions by brute force with
logits at every position (`direction_search.BruteForce`), keeps [samples, H, V] log-ratios, and trains all weights on a dense
loss. Random weights refuse nothing, so openers are given, and what the model does unsteered is the bar of the search's
first test, alike for both: so some candidates pass and others do not.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from direction_search import BruteForce, edited
from measuring import figure, parser_of, random_qwen3, record
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from safesteer.chat import Chat, left_pad
from safesteer.console import RunConsole
from safesteer.direction import DirectionSettings
from safesteer.direction_prompts import sampled_prompts
from safesteer.loading import load_tokenizer
from safesteer.pipeline import align
from safesteer.prompts import load_prompts
from safesteer.recipes import build_settings
from safesteer.testbed.demo import testbed_folder

OPENERS = tuple(range(0, 3_000, 2))  # of the tokenizer's
DIRECTION: dict[str, Any] = {
    "refusal_token_ids": list(OPENERS),
    "filter_prompts": False,
    "coefficient": 1.0,
    "max_kl": 10.0,
    "train_harmful": 64,
    "train_harmless": 64,
    "validation_harmful": 32,
    "validation_harmless": 32,
}
SAMPLES, HORIZON, SIZE, VOTES, BATCH, STEPS = 2, 7, 50, 200, 32, 4


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """Save random weights with the testbed's tokenizer."""
    tokenizer = load_tokenizer(str(testbed_folder() / "model"))
    model = random_qwen3(
        layers,
        hidden,
        151_936,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"{model.num_parameters() / 1e6:.0f} M parameters", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ours(folder: Path, completion: int) -> None:
    """`safesteer align` with its defaults (LoRA) and the sizes above."""
    prompts = testbed_folder() / "prompts"
    settings = build_settings(
        {
            "model": {"name": str(folder), "device": "cpu"},
            "prompts": {
                "harmful": str(prompts / "harmful_train.jsonl"),
                "harmful_count": 100,
                "harmless": str(prompts / "harmless_train.jsonl"),
                "harmless_count": 100,
            },
            "direction": DIRECTION,
            "safety_tokens": {
                "samples": SAMPLES,
                "horizon": HORIZON,
                "size": SIZE,
                "votes_per_position": VOTES,
            },
            "distillation": {
                "steps": STEPS,
                "batch_size": BATCH,
                "anchor_fraction": 0.0,
                "max_completion_length": completion,
                "probe_steps": 0,
                "checkpoint_steps": 0,
            },
            "run": {"output": str(folder / "run")},
        }
    )
    align(settings, RunConsole(quiet=True))


def reference(folder: Path, completion: int) -> None:
    """The same stages, plainly."""
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    chat = Chat(load_tokenizer(str(folder)))
    prompts = testbed_folder() / "prompts"
    harmful = load_prompts(prompts / "harmful_train.jsonl", count=100)
    harmless = load_prompts(prompts / "harmless_train.jsonl", count=100)
    settings = DirectionSettings(**{**DIRECTION, "refusal_token_ids": OPENERS})
    samples = sampled_prompts(harmful, harmless, settings)
    brute = BruteForce(teacher, chat, OPENERS, batch=32)
    (layer, position), _ = brute.search(samples, settings)
    positions = len(chat.post_instruction_ids)
    means = [brute.means(samples[f"train_{kind}"], positions) for kind in ("harmful", "harmless")]
    vector = (means[0] - means[1])[layer, position].float()
    ids_S = tokens(brute, teacher, vector, layer, samples["validation_harmless"])
    train(student, teacher, chat, vector, layer, ids_S, list(harmful.prompts), completion)
    student.save_pretrained(folder / "reference")


@torch.no_grad()
def tokens(
    brute: BruteForce,
    teacher: Qwen3ForCausalLM,
    vector: Tensor,
    layer: int,
    prompts: tuple[str, ...],
) -> Tensor:
    """Vote for safety tokens with the log-ratios of all trajectories at once, [samples, H, V]."""
    ids, mask = left_pad(
        brute.chat.encode([p for p in prompts for _ in range(SAMPLES)]), brute.chat.tokenizer.pad_token_id
    )
    steer = edited([brute.layers[layer]], lambda hidden: hidden + vector, inputs=True)
    with steer:
        sampled = teacher.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=HORIZON - 1,
            min_new_tokens=HORIZON - 1,
        )
    mask = F.pad(mask, (0, HORIZON - 1), value=1)
    steered = edited([brute.layers[layer]], lambda hidden: hidden + vector, inputs=True)
    with steered:
        log_q = teacher(input_ids=sampled, attention_mask=mask).logits.log_softmax(-1)[:, -HORIZON:]
    log_0 = teacher(input_ids=sampled, attention_mask=mask).logits.log_softmax(-1)[:, -HORIZON:]
    delta = log_q - log_0
    votes = torch.bincount(delta.topk(VOTES, dim=-1).indices.flatten(), minlength=delta.shape[-1])
    return votes.topk(SIZE).indices


def train(
    student: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    chat: Chat,
    vector: Tensor,
    layer: int,
    ids_S: Tensor,
    prompts: list[str],
    completion: int,
) -> None:
    """On-policy distillation on a dense truncated sum, full fine-tuning."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    layers = list(teacher.model.layers)
    for step in range(STEPS):
        batch = [prompts[(step * BATCH + i) % len(prompts)] for i in range(BATCH)]
        ids, mask = left_pad(chat.encode(batch), chat.tokenizer.pad_token_id)
        with torch.no_grad():
            rollout = student.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=completion
            )
        length = rollout.shape[1] - ids.shape[1]
        mask = F.pad(mask, (0, length), value=1)
        for start in range(0, BATCH, 8):
            rows = slice(start, start + 8)
            log_p = student(input_ids=rollout[rows], attention_mask=mask[rows]).logits.log_softmax(-1)
            with torch.no_grad(), edited([layers[layer]], lambda hidden: hidden + vector, inputs=True):
                log_q = teacher(input_ids=rollout[rows], attention_mask=mask[rows]).logits.log_softmax(-1)
            p, q = (x[:, -length - 1 : -1][..., ids_S] for x in (log_p, log_q))
            loss = (p.exp() * (p - q)).sum(-1).mean() * 8 / BATCH
            loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def run_alone(pipeline: str, folder: Path, completion: int) -> dict[str, float]:
    """Run one pipeline in a process of its own."""
    command = [sys.executable, __file__, "--run", pipeline, "--folder", str(folder)]
    command += ["--completion", str(completion)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return result


def main() -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--run", choices=("ours", "reference"), help="Run one pipeline and print its cost.")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.run:
        started = time.perf_counter()
        {"ours": ours, "reference": reference}[args.run](args.folder, args.completion)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(json.dumps({"seconds": time.perf_counter() - started, "peak_mb": peak}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, args.hidden, args.layers)
        cost = {pipeline: run_alone(pipeline, folder, args.completion) for pipeline in ("ours", "reference")}
    size = {"hidden": args.hidden, "layers": args.layers, "completion": args.completion}
    mine, plain = cost["ours"], cost["reference"]
    record(
        "end_to_end",
        [
            figure("align end to end, time", mine["seconds"], plain["seconds"], "s", **size),
            figure("align end to end, peak memory", mine["peak_mb"], plain["peak_mb"], "MB", **size),
        ],
    )


if __name__ == "__main__":
    main()
