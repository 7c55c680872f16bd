"""How much of the distillation's signal each position of a response carries: is a long `max_completion_length` worth it?

    python benchmarks/signal_by_position.py RUN [--tokens 32]

Samples the base model's responses to a run's harmful prompts, as the first training step does, and sums the divergence from
the run's steered teacher at its safety tokens by position. Writes `results/signal_by_position.json`.
"""

import json
from itertools import accumulate
from pathlib import Path

import torch
from measuring import parser_of

from safesteer.chat import Chat, generate, left_pad
from safesteer.direction import RefusalDirection
from safesteer.divergence import localized_divergence
from safesteer.loading import load_model, load_tokenizer
from safesteer.modeling import language_head
from safesteer.prompts import load_prompts
from safesteer.recipes import build_settings, load_recipe
from safesteer.safety_tokens import SafetyTokens
from safesteer.teacher import completion_hidden_states

RESULTS = Path(__file__).parent / "results" / "signal_by_position.json"


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=32, help="Of each response, at most.")
    args = parser.parse_args()
    settings = build_settings(load_recipe(args.run / "config.yaml"))
    model = load_model(settings.model.name)
    chat = Chat(load_tokenizer(settings.model.name))
    prompts = load_prompts(
        settings.prompts.harmful, count=settings.prompts.harmful_count, seed=settings.run.seed
    )
    ids_S = torch.tensor(SafetyTokens.load(args.run).ids, device=model.device)
    torch.manual_seed(0)
    responses = generate(
        model, chat, prompts.prompts, max_new_tokens=args.tokens, batch_size=50, temperature=1.0
    )

    pad, end = chat.tokenizer.pad_token_id, chat.tokenizer.eos_token_id
    prompt_ids, prompt_mask = left_pad(chat.encode(prompts.prompts), pad, model.device)
    encoded = [
        [*chat.tokenizer.encode(text, add_special_tokens=False), end][: args.tokens] for text in responses
    ]
    # Right padded: reversed rows, left padded, reversed again.
    reversed_ids, reversed_mask = left_pad([ids[::-1] for ids in encoded], pad, model.device)
    batch = prompt_ids, prompt_mask, reversed_ids.flip(1), reversed_mask.flip(1)
    student_BCH = completion_hidden_states(model, *batch)
    with RefusalDirection.load(args.run).steering.applied(model):
        teacher_BCH = completion_hidden_states(model, *batch)
    mask_BC = batch[3].float()
    head = language_head(model)
    divergence_BC = localized_divergence(
        student_BCH.flatten(0, 1),
        teacher_BCH.flatten(0, 1),
        head,
        head,
        mask_BC.flatten(),
        token_ids=ids_S,
        statistics=False,
    ).per_token.view(mask_BC.shape)

    by_position = (divergence_BC * mask_BC).sum(0)
    shares = list(accumulate((by_position / by_position.sum()).tolist()))
    mean = by_position / mask_BC.sum(0).clamp(min=1)
    rows = [
        {"position": t + 1, "nats": round(float(mean[t]), 4), "share_up_to_here": round(shares[t], 4)}
        for t in range(len(shares))
    ]
    for row in rows:
        print(
            f"token {row['position']:>3}  {row['nats']:.4f} nats  {row['share_up_to_here']:.1%} of all up to here"
        )
    RESULTS.write_text(json.dumps({"responses": len(responses), "positions": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
