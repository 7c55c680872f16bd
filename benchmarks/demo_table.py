"""Print figures of `safesteer demo --json` over several seeds as a Markdown table: mean, and the range over seeds.

    for seed in 0 1 2; do safesteer demo --seed $seed --output runs/demo-$seed --json runs/demo-$seed.json; done
    python benchmarks/demo_table.py runs/demo-0.json runs/demo-1.json runs/demo-2.json [--also NAME FILE …]

With --also, a further column holds the aligned model of other runs, for instance of `--vocabulary full`.
"""

import argparse
import json
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

ROWS = (
    ("attack success on harmful prompts ↓", "attack_success", 1),
    ("refuses harmless prompts ↓", "harmless_refusal", 1),
    ("refuses harmless prompts that sound harmful ↓", "alarming_refusal", 1),
    ("first token opens a refusal of a harmful prompt ↑", "opens_refusal.harmful", 1),
    ("first token opens a refusal of a harmless prompt ↓", "opens_refusal.harmless", 1),
    ("seven skills, mean accuracy ↑", "skill_mean", 1),
    ("perplexity of harmless answers ↓", "perplexity", 2),
)


def cell(records: list[dict[str, Any]], who: str, key: str, digits: int) -> str:
    """Mean over the records, and their range where they differ; a dot in `key` goes a level down."""
    values = [reduce(getitem, key.split("."), record[who]) for record in records]
    mean = f"{sum(values) / len(values):.{digits}f}"
    low, high = (f"{bound:.{digits}f}" for bound in (min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def main() -> None:
    """Read the files and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--also", nargs="+", action="append", default=[], metavar=("NAME", "FILE"))
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in args.files]
    columns = [("before", runs, "base"), ("safety teacher", runs, "teacher"), ("**after**", runs, "aligned")]
    for name, *files in args.also:
        columns.append((name, [json.loads(Path(path).read_text()) for path in files], "aligned"))
    print("| percent, greedy answers | " + " | ".join(name for name, _, _ in columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for label, key, digits in ROWS:
        print(
            f"| {label} | "
            + " | ".join(cell(records, who, key, digits) for _, records, who in columns)
            + " |"
        )


if __name__ == "__main__":
    main()
