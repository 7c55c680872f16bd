"""`align` beside a plain PyTorch pipeline that does the same job the straightforward way: time and peak memory.

    python benchmarks/end_to_end.py [--shape small] [--completion 32] [--full] [--device cpu] [--only ours]

A model of random weights (by default Qwen3-shaped, over 100 M parameters, the real vocabulary of 151,936), 100 harmful
prompts. Each pipeline runs in a process of its own, one after the other. Both train a LoRA adapter, or with --full all weights.
The reference holds two full models, searches directions by brute force with logits at every position
(`direction_search.BruteForce`), keeps [samples, H, V] log-ratios, and trains on a dense loss.

Random weights refuse nothing, so openers are given, and the bar of the search's first test is the mean of the candidates at
the last position, alike for both: so some candidates pass and others do not.
"""

import argparse
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
from measuring import figure, parser_of, record
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from safesteer.chat import Chat, left_pad
from safesteer.console import RunConsole
from safesteer.direction import DirectionSettings
from safesteer.direction_prompts import sampled_prompts
from safesteer.direction_scores import CandidateScorer, mean_layer_inputs
from safesteer.loading import load_tokenizer
from safesteer.next_token import NextTokenReader, no_progress
from safesteer.pipeline import align
from safesteer.prompts import PromptSet, load_prompts
from safesteer.recipes import build_settings
from safesteer.testbed.demo import testbed_folder

OPENERS = tuple(range(0, 3_000, 2))  # of the tokenizer's
DIRECTION: dict[str, Any] = {
    "refusal_token_ids": OPENERS,
    "filter_prompts": False,
    "coefficient": 1.0,
    "max_kl": 10.0,
    "train_harmful": 64,
    "train_harmless": 64,
    "validation_harmful": 24,
    "validation_harmless": 24,
}
KINDS = ("harmful", "harmless")
SAMPLES, HORIZON, SIZE, VOTES, BATCH, STEPS = 2, 7, 50, 200, 32, 4
SEED = 42
OPTIMIZER = "paged_adamw_8bit"  # of bitsandbytes, for all weights on a GPU


# Of Qwen/Qwen3-4B-Instruct-2507 and meta-llama/Meta-Llama-3-8B-Instruct: what their config.json says.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "qwen3",
        "vocab_size": 8_192,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "small": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 512,
        "intermediate_size": 1_536,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2_560,
        "intermediate_size": 9_728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


def make_model(folder: Path, shape: str, device: str) -> None:
    """Save random weights with the testbed's tokenizer, and the bar of the direction search's first test."""
    chat = Chat(load_tokenizer(str(testbed_folder() / "model")))
    ends = {"eos_token_id": chat.tokenizer.eos_token_id, "pad_token_id": chat.tokenizer.pad_token_id}
    config = AutoConfig.for_model(**SHAPES[shape], **ends, bos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_on(device)).eval()
    print(f"{model.num_parameters() / 1e6:.0f} M parameters", flush=True)
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    bar = middling_induction(model, chat)
    (folder / "bar.json").write_text(json.dumps(bar))
    del model
    if device != "cpu":
        torch.cuda.empty_cache()  # for the pipelines, which are processes of their own


def middling_induction(model: PreTrainedModel, chat: Chat) -> float:
    """The mean induction of the candidates at the last position."""
    samples = sampled_prompts(prompts_of("harmful"), prompts_of("harmless"), DirectionSettings(**DIRECTION))
    reader, layers = NextTokenReader(model, chat, 32), list(model.model.layers)
    with torch.no_grad():
        harmful, harmless = (mean_layer_inputs(reader, layers, samples[f"train_{k}"], 1) for k in KINDS)
        scorer = CandidateScorer(reader, layers, OPENERS, *(samples[f"validation_{k}"] for k in KINDS))
        vectors = (harmful - harmless)[:, 0].float()
        scores = scorer.induction({(i, -1): v for i, v in enumerate(vectors) if i}, no_progress)
    return sum(scores.values()) / len(scores)


def dtype_on(device: str) -> torch.dtype:
    """Weights are bfloat16 on a GPU, float32 on a CPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def prompts_of(kind: str) -> PromptSet:
    """A hundred prompts of the testbed's, those that `align` draws."""
    return load_prompts(testbed_folder() / "prompts" / f"{kind}_train.jsonl", count=100, seed=SEED)


def search_settings(folder: Path) -> dict[str, Any]:
    """Settings of the direction search, alike for both."""
    return {**DIRECTION, "min_induction": json.loads((folder / "bar.json").read_text())}


def ours(folder: Path, completion: int, full: bool, device: str) -> None:
    """`safesteer align` with its defaults and the sizes above; all weights in 16 bits where 8 billion have to fit."""
    prompts = testbed_folder() / "prompts"
    all_weights = {
        "master_dtype": "bfloat16",
        "teacher_copy": "cpu",
        "gradient_checkpointing": True,
        "trainer_args": {"optim": OPTIMIZER} if device != "cpu" else {},
    }
    settings = build_settings(
        {
            "model": {"name": str(folder), "device": device},
            "prompts": {
                "harmful": str(prompts / "harmful_train.jsonl"),
                "harmful_count": 100,
                "harmless": str(prompts / "harmless_train.jsonl"),
                "harmless_count": 100,
            },
            "direction": search_settings(folder),
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
                "train_layers": "all",  # as the reference does; depth.py has what the default saves
                "lora": not full,
                **(all_weights if full else {}),
            },
            "run": {"output": str(folder / "run"), "seed": SEED},
        }
    )
    align(settings, RunConsole(quiet=True))


def reference(folder: Path, completion: int, full: bool, device: str) -> None:
    """The same stages, plainly."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_on(device), device_map=device)
        for _ in range(2)
    )
    teacher.eval().requires_grad_(False)
    chat = Chat(load_tokenizer(str(folder)))
    harmful, harmless = prompts_of("harmful"), prompts_of("harmless")
    settings = DirectionSettings(**search_settings(folder))
    samples = sampled_prompts(harmful, harmless, settings)
    brute = BruteForce(teacher, chat, OPENERS, batch=32)
    (layer, position), _ = brute.search(samples, settings)
    positions = len(chat.post_instruction_ids)
    means = [brute.means(samples[f"train_{kind}"], positions) for kind in ("harmful", "harmless")]
    vector = (means[0] - means[1])[layer, position].to(dtype_on(device))
    if not full:
        student = get_peft_model(student, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    ids_S = tokens(brute, teacher, vector, layer, samples["validation_harmless"])
    train(student, teacher, chat, vector, layer, ids_S, list(harmful.prompts), completion)
    student.save_pretrained(folder / "reference")


@torch.no_grad()
def tokens(
    brute: BruteForce,
    teacher: PreTrainedModel,
    vector: Tensor,
    layer: int,
    prompts: tuple[str, ...],
) -> Tensor:
    """Vote for safety tokens with the log-ratios of all trajectories at once, [samples, H, V]."""
    ids, mask = left_pad(
        brute.chat.encode([p for p in prompts for _ in range(SAMPLES)]),
        brute.chat.tokenizer.pad_token_id,
        teacher.device,
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
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    chat: Chat,
    vector: Tensor,
    layer: int,
    ids_S: Tensor,
    prompts: list[str],
    completion: int,
) -> None:
    """On-policy distillation on a dense truncated sum."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)
    layers = list(teacher.model.layers)
    for step in range(STEPS):
        batch = [prompts[(step * BATCH + i) % len(prompts)] for i in range(BATCH)]
        ids, mask = left_pad(chat.encode(batch), chat.tokenizer.pad_token_id, teacher.device)
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


def run_alone(pipeline: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run one pipeline in a process of its own."""
    command = [sys.executable, __file__, "--run", pipeline, "--folder", str(folder)]
    command += ["--completion", str(args.completion), "--device", args.device, *["--full"] * args.full]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    print(f"{pipeline}: {result['seconds']:.1f} s, {result['peak_mb']:.0f} MB", flush=True)
    return result


def peak_memory(device: str) -> float:
    """MB at the peak: of the GPU, or of this process."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return torch.cuda.max_memory_allocated() / 1e6


def main() -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--full", action="store_true", help="Train all weights.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("ours",), help="Leave the reference out; nothing is recorded.")
    parser.add_argument("--run", choices=("ours", "reference"), help="Run one pipeline and print its cost.")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.run:
        started = time.perf_counter()
        {"ours": ours, "reference": reference}[args.run](args.folder, args.completion, args.full, args.device)
        print(json.dumps({"seconds": time.perf_counter() - started, "peak_mb": peak_memory(args.device)}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, args.shape, args.device)
        mine = run_alone("ours", folder, args)
        if args.only:
            return
        plain = run_alone("reference", folder, args)
    size = {"shape": args.shape, "completion": args.completion, "full": args.full}
    record(
        "end_to_end" if args.shape == "small" else f"end_to_end, {args.shape}",
        [
            figure("align end to end, time", mine["seconds"], plain["seconds"], "s", **size),
            figure("align end to end, peak memory", mine["peak_mb"], plain["peak_mb"], "MB", **size),
        ],
    )


if __name__ == "__main__":
    main()
