"""What evaluating costs beside generating: `evaluate` against a bare length-sorted batched `generate` loop.

    python benchmarks/evaluation_overhead.py [--records 1000] [--repeats 3]

Both answer the same prompts with the bundled testbed, in one process, in turns. `evaluate` also writes every record to
disk and syncs it, has two judges, writes the Inspect log, intervals and tables. "inspect eval" is the same task run by
Inspect's own `eval` with this package's provider, for comparison. On a machine that other work keeps busy the processor
time tells more than the wall clock; both are reported. Writes benchmarks/results/evaluation_overhead.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safesteer.evaluation.records import EvaluationPrompt, Record, RecordFile
from safesteer.evaluation.runner import evaluate
from safesteer.evaluation.subjects import subjects_of
from safesteer.evaluation.tasks import answer, dataset_of, judged_by
from safesteer.prompts import load_prompts
from safesteer.testbed.demo import testbed_folder

RESULTS = Path(__file__).parent / "results" / "evaluation_overhead.json"
BAR_MS = 15.0


def bare_loop(prompts: list[str], max_new_tokens: int, batch_size: int) -> list[str]:
    """Answer prompts with transformers alone."""
    folder = testbed_folder() / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    lengths = [len(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(texts)), key=lambda index: -lengths[index])
    responses = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer(
            [texts[index] for index in batch], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        for index, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            responses[index] = text
    return responses


def whole_evaluation(prompts: list[EvaluationPrompt], max_new_tokens: int, batch_size: int) -> list[str]:
    """Evaluate the prompts, records, judges and log included; return the recorded responses."""
    with tempfile.TemporaryDirectory() as folder:
        subjects = subjects_of(testbed_folder() / "model", device="cpu")
        evaluate(
            subjects,
            {"bundled": prompts},
            output=folder,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        records = RecordFile(Path(folder) / subjects[0].name / "bundled" / "responses.jsonl", Record).load()
    return [records[prompt.id].response for prompt in prompts]


def inspect_eval(prompts: list[EvaluationPrompt], max_new_tokens: int, batch_size: int) -> list[str]:
    """Run the same task by Inspect's own `eval`."""
    from inspect_ai import Task
    from inspect_ai import eval as run_eval
    from inspect_ai.model import GenerateConfig, get_model

    from safesteer.evaluation import registry_of_inspect  # noqa: F401  # registers the provider

    subject = subjects_of(testbed_folder() / "model", device="cpu")[0]
    task = Task(
        dataset=dataset_of("bundled", prompts),
        solver=answer("bundled"),
        scorer=[judged_by("refusal-phrases"), judged_by("arditi-phrases")],
        config=GenerateConfig(max_tokens=max_new_tokens, temperature=0.0),
    )
    model = get_model("safesteer/testbed", memoize=False, subject=subject, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        (log,) = run_eval(task, model=model, log_dir=folder, display="none", log_realtime=False)
        # Read here: the samples are loaded from the log's file when they are first looked at.
        found = {str(sample.id): sample.output.completion for sample in log.samples or []}
    return [found[prompt.id] for prompt in prompts]


def timed(work: Callable[[], list[str]]) -> tuple[float, float, list[str]]:
    """Return seconds on the wall, seconds of processor time, and the responses."""
    wall, processor = time.perf_counter(), time.process_time()
    responses = work()
    return time.perf_counter() - wall, time.process_time() - processor, responses


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    source = load_prompts(testbed_folder() / "prompts" / "harmless_train.jsonl", count=args.records, seed=0)
    prompts = [EvaluationPrompt(f"{index:05d}", text, "harmful") for index, text in enumerate(source.prompts)]
    ways: dict[str, Callable[[], list[str]]] = {
        "bare loop": lambda: bare_loop(list(source.prompts), args.max_new_tokens, args.batch_size),
        "evaluate": lambda: whole_evaluation(prompts, args.max_new_tokens, args.batch_size),
        "inspect eval": lambda: inspect_eval(prompts, args.max_new_tokens, args.batch_size),
    }
    few = {name: way for name, way in ways.items() if name != "inspect eval"}
    bare_loop(list(source.prompts[:64]), args.max_new_tokens, args.batch_size)  # warm up
    whole_evaluation(prompts[:64], args.max_new_tokens, args.batch_size)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    responses: dict[str, list[str]] = {}
    for repeat in range(args.repeats):
        for name, way in (ways if repeat == 0 else few).items():
            wall, processor, responses[name] = timed(way)
            seconds[name].append((wall, processor))
            print(f"{name:<13} {wall:7.2f} s wall {processor:7.2f} s processor", flush=True)
    record: dict[str, object] = {
        "records": args.records,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "bar_ms_per_record": BAR_MS,
        "identical_responses": responses["bare loop"] == responses["evaluate"] == responses["inspect eval"],
    }
    for column, clock in enumerate(("wall", "processor")):
        bare = statistics.median(pair[column] for pair in seconds["bare loop"])
        record[f"bare_loop_{clock}_s"] = round(bare, 3)
        for name in ("evaluate", "inspect eval"):
            median = statistics.median(pair[column] for pair in seconds[name])
            key = name.replace(" ", "_")
            record[f"{key}_{clock}_s"] = round(median, 3)
            record[f"{key}_overhead_{clock}_ms_per_record"] = round(1000 * (median - bare) / args.records, 3)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
