"""The head's product with the few rows of a next token, in the order of `safesteer.few_rows` and in `linear`'s; a CPU's only.

python benchmarks/few_rows.py
"""

import torch
from measuring import figure, parser_of, record, side_by_side
from torch import nn

from safesteer.few_rows import few_rows_linear

VOCABULARY, HIDDEN = 151_936, 512


def main() -> None:
    """Measure and record."""
    parser_of(__doc__).parse_args()
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN)
    entries = []
    for count in (8, 32):
        rows = torch.randn(count, HIDDEN)
        times = side_by_side(
            {
                "ours": lambda rows=rows: few_rows_linear(rows, weight),
                "linear": lambda rows=rows: nn.functional.linear(rows, weight),
            },
            rounds=11,
        )
        entries.append(figure(f"next token's logits, {count} rows", times["ours"], times["linear"], "s"))
    record("few_rows", entries)


if __name__ == "__main__":
    main()
