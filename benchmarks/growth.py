"""How time grows with prompts, response length, vocabulary and layers: linearly, but for the direction search's layers.

    python benchmarks/growth.py [--plot docs/images/growth.png]

Each series doubles one size. The exponent is the slope of log time over log size, by least squares; the cost model it is
held against is in docs/cost.md.
"""

import math
from collections.abc import Callable
from pathlib import Path

from depth import step_seconds
from loss import Case
from measuring import figure, parser_of, random_qwen3, record, side_by_side

from safesteer.chat import Chat, generate
from safesteer.direction import DirectionSettings, find_refusal_direction
from safesteer.loading import load_tokenizer
from safesteer.prompts import PromptSet, load_prompts
from safesteer.testbed.demo import testbed_folder

Series = dict[int, float]


def direction_seconds(chat: Chat, layers: int, prompts: int) -> float:
    """One direction search."""
    model = random_qwen3(layers, 128, 8_192, heads=4)
    folder = testbed_folder() / "prompts"
    sets: list[PromptSet] = [load_prompts(folder / f"{kind}_train.jsonl") for kind in ("harmful", "harmless")]
    settings = DirectionSettings(
        refusal_token_ids=tuple(range(0, len(chat.tokenizer), 2)),
        filter_prompts=False,
        coefficient=1.0,
        max_kl=10.0,
        min_induction=-100.0,
        train_harmful=prompts,
        train_harmless=prompts,
        validation_harmful=prompts,
        validation_harmless=prompts,
    )
    return side_by_side({"search": lambda: find_refusal_direction(model, chat, *sets, settings)}, 1, 0)[
        "search"
    ]


def rollout_seconds(chat: Chat, length: int) -> float:
    """32 sampled responses of one length."""
    model = random_qwen3(4, 128, 8_192, heads=4, eos_token_id=None, pad_token_id=0)
    prompts = load_prompts(testbed_folder() / "prompts" / "harmful_train.jsonl", count=32).prompts
    work: Callable[[], object] = lambda: generate(  # noqa: E731
        model, chat, prompts, max_new_tokens=length, batch_size=32, temperature=1.0
    )
    return side_by_side({"rollout": work}, 2)["rollout"]


def loss_seconds(tokens: int, vocabulary: int) -> float:
    """One loss, forward and backward."""
    case = Case(tokens, 256, vocabulary, trained_head=False)
    return side_by_side({"loss": case.localized}, 3)["loss"]


def exponent(series: Series) -> float:
    """Slope of log seconds over log size."""
    x = [math.log(size) for size in series]
    y = [math.log(seconds) for seconds in series.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    """Measure, record, plot."""
    parser = parser_of(__doc__)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    chat = Chat(load_tokenizer(str(testbed_folder() / "model")))
    series: dict[str, Series] = {
        "loss, response tokens": {n: loss_seconds(n, 32_768) for n in (256, 512, 1024, 2048)},
        "loss, vocabulary": {v: loss_seconds(512, v) for v in (16_384, 32_768, 65_536, 131_072)},
        "rollouts, response length": {n: rollout_seconds(chat, n) for n in (16, 32, 64, 128)},
        "training step, layers": {
            n: step_seconds(random_qwen3(n, 128, 8_192, heads=4), chat, "all", True, 32) for n in (4, 8, 16)
        },
        "direction search, prompts": {n: direction_seconds(chat, 6, n) for n in (16, 32, 64, 128)},
        "direction search, layers (quadratic: candidates times depth)": {
            n: direction_seconds(chat, n, 16) for n in (4, 8, 16)
        },
    }
    record(
        "growth",
        [
            figure(f"growth of {name}: exponent", exponent(points), 1.0, "", seconds=points)
            for name, points in series.items()
        ],
    )
    if args.plot:
        plot(series, args.plot)


def plot(series: dict[str, Series], path: Path) -> None:
    """Draw the series on doubly logarithmic axes, each relative to its first point."""
    import matplotlib.pyplot as plt

    figure_, axes = plt.subplots(figsize=(6.4, 4.2))
    for name, points in series.items():
        sizes, seconds = list(points), list(points.values())
        axes.plot(
            [size / sizes[0] for size in sizes],
            [second / seconds[0] for second in seconds],
            marker="o",
            label=f"{name} (exponent {exponent(points):.2f})",
        )
    axes.plot([1, 8], [1, 8], color="grey", linestyle=":", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="size, relative", ylabel="time, relative")
    axes.legend(fontsize=7, loc="lower right")
    figure_.tight_layout()
    figure_.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
