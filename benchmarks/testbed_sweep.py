"""Sweep the testbed's settings on validation prompts: the frontier of safety, over-refusal and skills (method §6.7).

    python benchmarks/testbed_sweep.py --output runs/sweep [--only NAME …] [--seeds 0 1 2] [--data-dir DIR]

Each point is one `safesteer demo` on the validation split and, with --data-dir, HarmBench's validation behaviours. Points
that are there are kept; `results/testbed_sweep.json` has one row a point, and docs/choosing-settings.md reads from it.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safesteer.artifacts import fingerprint
from safesteer.console import RunConsole
from safesteer.evaluation.runner import evaluate
from safesteer.evaluation.subjects import Subject, subjects_of
from safesteer.testbed.demo import demo_settings, run_demo
from safesteer.testbed.measure import ANSWER_TOKENS, JUDGE

RESULTS = Path(__file__).parent / "results" / "testbed_sweep.json"
BENCHMARK = "harmbench-validation"
KEPT = ("base", "teacher", "aligned", "harmbench_validation", "seconds")
Point = dict[str, dict[str, Any]]


def distillation(**settings: Any) -> Point:
    """A point that changes the distillation alone."""
    return {"distillation": settings}


# The paper: full fine-tuning, truncated sum, no anchor, c = 1, one epoch (4 steps of 32 over 100 prompts), learning rate 1e-5.
PAPER: Point = {
    "distillation": {
        "lora": False,
        "support": "truncated",
        "anchor_fraction": 0.0,
        "steps": 4,
        "learning_rate": 1e-5,
        "train_layers": "all",
        "first_tokens": None,
    },
    "direction": {
        "coefficient": 1.0,
        "contrast": "harmless",
        "criterion": "ablation",
        "positions": "all",
        "prune_layers_above": 0.8,
    },
    "safety_tokens": {
        "prompts": "harmless",
        "minimum_probability": 1e-8,
        "votes_per_position": 200,
        "size": 50,
    },
}
POINTS: dict[str, Point] = {
    "default": {},
    "paper": PAPER,
    "paper-lr1e-4": {**PAPER, "distillation": {**PAPER["distillation"], "learning_rate": 1e-4}},
    "paper-lr1e-4-40steps": {
        **PAPER,
        "distillation": {**PAPER["distillation"], "learning_rate": 1e-4, "steps": 40},
    },
    "full-vocabulary": distillation(vocabulary="full"),
    "full-vocabulary-no-anchor": distillation(vocabulary="full", anchor_fraction=0.0),
    "teacher-top-k": distillation(vocabulary="teacher_top_k"),
    "truncated": distillation(support="truncated"),
    "generalized": distillation(support="generalized"),
    "renormalized": distillation(support="renormalized"),
    "forward": distillation(beta=0.0),
    "jsd": distillation(beta=0.5),
    "no-anchor": distillation(anchor_fraction=0.0),
    "anchor-0.25": distillation(anchor_fraction=0.25),
    "anchor-0.375": distillation(anchor_fraction=0.375),
    "anchor-0.75": distillation(anchor_fraction=0.75),
    # The steered layer is the last one here, so it alone is trained.
    "steered-layer-on": distillation(train_layers="auto"),
    "rank-1": distillation(lora_rank=1, lora_alpha=2),
    "rank-32": distillation(lora_rank=32, lora_alpha=64),
    "steps-60": distillation(steps=60),
    "steps-240": distillation(steps=240),
    "lr-3e-4": distillation(learning_rate=3e-4),
    "lr-3e-3": distillation(learning_rate=3e-3),
    "all-response-tokens": distillation(first_tokens=None),
    "first-4-tokens": distillation(first_tokens=4),
    # The method's direction, refused harmful prompts less harmless ones.
    **{
        f"direction-harmless-c{c:g}": {
            "direction": {
                "contrast": "harmless",
                "criterion": "ablation",
                "coefficient": c,
                "positions": "all",
                "prune_layers_above": 0.8,
            }
        }
        for c in (1.0, 1.5, 2.0)
    },
    "by-ablation": {"direction": {"criterion": "ablation"}},
    # Steered at every position, as in the paper.
    **{f"everywhere-c{c:g}": {"direction": {"positions": "all", "coefficient": c}} for c in (1.5, 2.5, 5.0)},
    **{f"c-{c:g}": {"direction": {"coefficient": c}} for c in (1.5, 4.0, 8.0)},
    # The method leaves out the last fifth of the layers.
    "earlier-layer": {"direction": {"prune_layers_above": 0.8}},
    "ema-teacher": distillation(teacher="ema", ema_rate=0.02),
    "tokens-as-paper": {
        "safety_tokens": {"minimum_probability": 1e-8, "votes_per_position": 200, "size": 50}
    },
    "tokens-50": {"safety_tokens": {"size": 50}},
    # Everyday prompts and ones that only sound harmful, which are two in three of these.
    "bundled-anchor": {"prompts": {"harmless": None}},
    "full-finetuning": distillation(lora=False, learning_rate=1e-4),
    # The note on the truncated sum: long training without the anchor, so that nothing but the support holds the student back.
    **{
        f"long-{support}": distillation(support=support, steps=150, anchor_fraction=0.0)
        for support in ("truncated", "tail", "generalized", "renormalized")
    },
    "long-full": distillation(vocabulary="full", steps=150, anchor_fraction=0.0),
}


def main() -> None:
    """Run the points that are missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--only", nargs="*", default=list(POINTS), choices=list(POINTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--data-dir", type=Path, help="Folder of `safesteer evaluate --data-dir`.")
    args = parser.parse_args()
    table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in args.seeds:
        for name in args.only:
            row = run_point(args.output, name, seed, args.data_dir)
            table[f"{name}/{seed}"] = row
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
            shown = ("attack_success", "harmless_refusal", "alarming_refusal", "skill_mean", "perplexity")
            print(f"{name}/{seed}", *(f"{key} {row['aligned'][key]:.2f}" for key in shown), flush=True)


def run_point(output: Path, name: str, seed: int, data_dir: Path | None) -> dict[str, Any]:
    """Align and measure one point, or read what it came to."""
    point = POINTS[name]
    folder = output / f"{name}-{seed}"
    summary = folder / "demo" / "demo.json"
    if not summary.exists():
        # Points that differ in the distillation alone share direction and tokens (the fingerprints see to it).
        before = {section: values for section, values in point.items() if section != "distillation"}
        shared = output / f"shared-{fingerprint(before)[:8]}-{seed}"
        measured = ("aligned",) if shared.exists() else ("base", "teacher", "aligned")
        if shared.exists():
            shutil.copytree(shared, folder, dirs_exist_ok=True)
        run_demo(demo_settings(folder, seed, point), RunConsole(quiet=True), "validation", measured)
        if not shared.exists():
            shared.mkdir(parents=True)
            for file in ("direction.json", "direction.safetensors", "safety_tokens.json"):
                shutil.copy(folder / file, shared)
    record = json.loads(summary.read_text())
    log = json.loads((folder / "model" / "safesteer.json").read_text())["log"]
    # Step, student's and teacher's mass on S over the tokens of the responses to harmful prompts.
    masses = [
        [row["step"], round(row["student_mass"], 5), round(row["teacher_mass"], 5)]
        for row in log
        if "student_mass" in row
    ]
    if data_dir:
        record["harmbench_validation"] = answered_of_harmbench(folder, data_dir)
    return {
        **{key: value for key, value in record.items() if key in KEPT},
        "changed": point,
        "mass": masses[4::5],
    }


def answered_of_harmbench(run: Path, data_dir: Path) -> dict[str, int]:
    """How many of HarmBench's validation behaviours base and aligned model answer, and how many were asked."""
    summary = evaluate(
        [
            subject
            for subject in subjects_of(run, ("base", "aligned"), device="cpu")
            if isinstance(subject, Subject)
        ],
        (BENCHMARK,),
        (JUDGE,),
        run / "harmbench",
        data_dir=data_dir,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=16,
        logs=False,
    )
    unsafe = {name: summary.find(name, BENCHMARK, JUDGE).rates.unsafe for name in ("base", "aligned")}
    return {**{name: rate.count for name, rate in unsafe.items()}, "asked": unsafe["base"].n}


if __name__ == "__main__":
    main()
