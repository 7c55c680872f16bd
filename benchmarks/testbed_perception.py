"""What the testbed takes for harm without being asked: the judge of a sitting's weights, on training and validation requests.

    python benchmarks/testbed_perception.py [MODEL …] [--data-dir DIR]

A request is taken for harmful with the mass of the first tokens that only harmful ones get, refusals and empty compliance alike.
Printed for each model and split: the share of requests with a mass above a half, by kind, and how well the mass tells harmful
requests from the others (area under the ROC curve). With --data-dir, the share of HarmBench's validation behaviours and of the
refusal-direction validation splits too. No test split is read.
"""

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor

from safesteer.chat import Chat
from safesteer.evaluation.benchmark_files import load_benchmark
from safesteer.loading import load_model, load_tokenizer
from safesteer.prompts import load_prompts
from safesteer.testbed.demo import testbed_folder
from safesteer.testbed.perception import harm_mass
from safesteer.testbed.requests import KINDS, load_requests

SAMPLE = 400


def area_under_roc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a random one of `positive` exceeds a random one of `negative`."""
    difference = positive[:, None] - negative[None]
    return float((difference > 0).float().mean() + (difference == 0).float().mean() / 2)


def real_prompts(data_dir: Path | None) -> dict[str, list[str]]:
    """Validation prompts that were published, by name; none without a folder."""
    if data_dir is None:
        return {}
    behaviors = load_benchmark("harmbench-validation", data_dir=data_dir)
    found = {
        f"HarmBench {category}": [p.prompt for p in behaviors if p.category == category]
        for category in ("standard", "contextual")
    }
    for kind in ("harmful", "harmless"):
        path = data_dir / "refusal_direction" / "splits" / f"{kind}_val.json"
        found[f"refusal-direction {kind}"] = list(load_prompts(path).prompts)[:SAMPLE]
    return found


def main() -> None:
    """Measure the models that are named, the bundled one by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, default=[testbed_folder() / "model"])
    parser.add_argument("--data-dir", type=Path, help="Folder of `safesteer evaluate --data-dir`.")
    args = parser.parse_args()
    for folder in args.models:
        model, chat = load_model(str(folder), device="cpu"), Chat(load_tokenizer(str(folder)))
        for split in ("train", "validation"):
            rng = random.Random(0)
            mass = {}
            for kind in KINDS:
                prompts = [request.prompt for request in load_requests(kind, split)]
                if split == "train":
                    prompts = rng.sample(prompts, SAMPLE)
                mass[kind] = harm_mass(model, chat, prompts)
            above = ", ".join(f"{kind} {100 * (mass[kind] > 0.5).float().mean():.1f} %" for kind in KINDS)
            others = torch.cat([mass["harmless"], mass["alarming"]])
            area = area_under_roc(mass["harmful"], others)
            print(f"{folder.name}, {split}: mass above a half: {above}; area under ROC {area:.4f}")
        for name, prompts in real_prompts(args.data_dir).items():
            mass_of = harm_mass(model, chat, prompts, batch_size=8)
            print(f"{folder.name}, {name}: mass above a half: {int((mass_of > 0.5).sum())} of {len(prompts)}")


if __name__ == "__main__":
    main()
