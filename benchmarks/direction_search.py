"""The refusal direction search beside brute force: the same choice and the same scores.

    python benchmarks/direction_search.py [--layers 20] [--hidden 128] [--vocabulary 151936]

Brute force is the method as it is written down (§1; the released code does the same): for every layer and every template
position three whole passes over the validation prompts, with logits at every position of the sequence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from measuring import figure, parser_of, random_qwen3, record, side_by_side
from torch import Tensor, nn
from transformers import PreTrainedModel

from safesteer.chat import Chat, left_pad
from safesteer.direction import DirectionSettings, RefusalDirection, find_refusal_direction, refusal_score
from safesteer.direction_prompts import sampled_prompts
from safesteer.loading import load_tokenizer
from safesteer.prompts import load_prompts
from safesteer.testbed.demo import testbed_folder

Scores = dict[tuple[int, int], tuple[float, float, float]]


@contextmanager
def edited(modules: list[nn.Module], edit: Callable[[Tensor], Tensor], *, inputs: bool) -> Iterator[None]:
    """Apply `edit` to the modules' input or output hidden states."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (edit(args[0]), *args[1:])

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    hooks = [
        m.register_forward_pre_hook(before) if inputs else m.register_forward_hook(after) for m in modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class BruteForce:
    """Every candidate, three whole passes each."""

    def __init__(self, model: PreTrainedModel, chat: Chat, openers: tuple[int, ...], batch: int) -> None:
        self.model, self.chat, self.openers, self.batch = model, chat, openers, batch
        self.layers = list(model.model.layers)

    def _padded(self, prompts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        return left_pad(self.chat.encode(prompts), self.chat.tokenizer.pad_token_id, self.model.device)

    @torch.no_grad()
    def logits(self, prompts: tuple[str, ...]) -> Tensor:
        """Next-token logits [n, V], of whole sequences of them."""
        rows = []
        for start in range(0, len(prompts), self.batch):
            ids, mask = self._padded(prompts[start : start + self.batch])
            rows.append(self.model(input_ids=ids, attention_mask=mask).logits[:, -1].double())
        return torch.cat(rows)

    @torch.no_grad()
    def means(self, prompts: tuple[str, ...], positions: int) -> Tensor:
        """Mean residual stream at the layers' inputs, [layers, positions, H] float64."""
        total: Tensor | float = 0.0
        for start in range(0, len(prompts), self.batch):
            ids, mask = self._padded(prompts[start : start + self.batch])
            hidden = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[
                :-1
            ]
            total = total + torch.stack([h[:, -positions:].double().sum(0) for h in hidden])
        assert isinstance(total, Tensor)
        return total / len(prompts)

    def search(
        self, samples: dict[str, tuple[str, ...]], settings: DirectionSettings
    ) -> tuple[tuple[int, int], Scores]:
        """Score every candidate, then select by the method's rule."""
        positions = len(self.chat.post_instruction_ids)
        vectors = self.means(samples["train_harmful"], positions) - self.means(
            samples["train_harmless"], positions
        )
        base = self.logits(samples["validation_harmless"]).log_softmax(-1)
        scores: Scores = {}
        for layer in range(len(self.layers)):
            for position in range(-positions, 0):
                vector = vectors[layer, position].to(self.model.dtype)
                if vector.norm() < 1e-6:
                    continue
                scores[layer, position] = self._scores(layer, vector, samples, base)
        alive = [
            c
            for c, (induction, kl, _) in scores.items()
            if c[0] < int(settings.prune_layers_above * len(self.layers))
            and kl <= settings.max_kl
            and induction >= settings.min_induction
        ]
        return min(alive, key=lambda c: scores[c][2]), scores

    def _scores(
        self, layer: int, vector: Tensor, samples: dict[str, tuple[str, ...]], base: Tensor
    ) -> tuple[float, float, float]:
        unit = vector / vector.norm()

        def project(hidden: Tensor) -> Tensor:
            return hidden - (hidden @ unit)[..., None] * unit

        with edited([self.layers[layer]], lambda hidden: hidden + vector, inputs=True):
            induced = refusal_score(self.logits(samples["validation_harmless"]), self.openers).mean()
        writers = [part for block in self.layers for part in (block.self_attn, block.mlp)]
        with edited(self.layers, project, inputs=True), edited(writers, project, inputs=False):
            after = self.logits(samples["validation_harmless"]).log_softmax(-1)
            kl = (base.exp() * (base - after)).sum(-1).mean()
            ablated = refusal_score(self.logits(samples["validation_harmful"]), self.openers).mean()
        return float(induced), float(kl), float(ablated)


def main() -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    chat = Chat(load_tokenizer(str(testbed_folder() / "model")))
    model = random_qwen3(args.layers, args.hidden, args.vocabulary, initializer_range=0.05)
    # Of a random model every second token of the tokenizer "refuses".
    openers = tuple(range(0, len(chat.tokenizer), 2))
    prompts = testbed_folder() / "prompts"
    harmful, harmless = (load_prompts(prompts / f"{kind}_train.jsonl") for kind in ("harmful", "harmless"))
    settings = DirectionSettings(
        refusal_token_ids=openers,
        filter_prompts=False,
        coefficient=1.0,
        max_kl=10.0,
        train_harmful=32,
        train_harmless=32,
        validation_harmful=16,
        validation_harmless=16,
        batch_size=args.batch,
        fallback="error",
    )
    samples = sampled_prompts(harmful, harmless, settings)
    brute = BruteForce(model, chat, openers, args.batch)
    # What the model does unsteered is the bar: so some candidates induce and others do not.
    unsteered = refusal_score(brute.logits(samples["validation_harmless"]), openers).mean()
    settings = replace(settings, min_induction=float(unsteered))
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = find_refusal_direction(model, chat, harmful, harmless, settings)

    def reference() -> None:
        found["reference"] = brute.search(samples, settings)

    seconds = side_by_side({"ours": ours, "reference": reference}, args.rounds, warm_up=0)
    chosen, scores = found["reference"]
    direction: RefusalDirection = found["ours"]
    assert (direction.layer, direction.position) == chosen, (direction.layer, direction.position, chosen)
    worst = 0.0
    for candidate in direction.candidates:
        expected = scores.get((candidate.layer, candidate.position))
        mine = (candidate.induction, candidate.kl, candidate.ablation_refusal)
        for value, reference_value in zip(mine, expected or (), strict=False):
            if value == value:  # scores that no test needed are NaN
                worst = max(worst, abs(value - reference_value))
    size = {"layers": args.layers, "hidden": args.hidden, "vocabulary": args.vocabulary}
    record(
        "direction_search",
        [
            figure(
                "direction search against brute force", seconds["ours"], seconds["reference"], "s", **size
            ),
            figure("direction search, largest difference of a score (bar)", worst, 1e-4, "log-odds or nats"),
        ],
    )


if __name__ == "__main__":
    main()
