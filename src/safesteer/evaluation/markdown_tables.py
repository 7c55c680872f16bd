"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(names: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table, and an empty line behind it.

    Args:
        names: Heads of the first columns, which hold text.
        numbers: Heads of the others, which hold numbers.
        rows: As many cells each; what would break the table is replaced.
    """
    return [
        f"| {' | '.join(map(_cell, (*names, *numbers)))} |",
        "|" + "---|" * len(names) + "---:|" * len(numbers),
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
        "",
    ]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
