"""What `safesteer demo` prints: one table, answers side by side, what was found, where it is."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from safesteer.console import RunConsole

if TYPE_CHECKING:
    from safesteer.testbed.demo import DemoResult
    from safesteer.testbed.measure import Answer, Measurement

_ANSWERS_SHOWN = {"harmful": 5, "alarming": 3, "harmless": 2}
_TOKENS_SHOWN = 16
# Points between refusals begun and refusals given, from which on a teacher's answers are said to fall apart.
_NOISE = 10


def show_demo(console: RunConsole, result: "DemoResult") -> None:
    """Print everything a person wants to see of a finished demo."""
    out = console.console
    out.print()
    out.print(_figures(result))
    if learnt := result.settings.distillation.first_tokens:
        first = "first token" if learnt == 1 else f"first {learnt} tokens"
        out.print(f"The student learns the {first} of the teacher's answers.")
    teacher = result.measurements["teacher"]
    if teacher.opens_refusal["harmful"] - (100 - teacher.attack_success) > _NOISE:
        out.print(
            "The teacher opens refusals that it does not go on with: steered so strongly, it talks nonsense, which no judge "
            "calls a refusal. A smaller --coefficient, or --positions post_instruction, helps."
        )
    out.print()
    out.print(_answers(result))
    direction, tokens = result.run.direction, result.run.safety_tokens
    shown = " ".join(repr(token.text) for token in tokens.tokens[:_TOKENS_SHOWN])
    out.print(
        f"\n[bold]Refusal direction[/]  layer {direction.layer}, position {direction.position}, "
        f"coefficient {direction.coefficient:g}: the teacher's first token opens a refusal of "
        f"{teacher.opens_refusal['harmful']:.0f}% of the harmful prompts"
    )
    out.print(f"[bold]Safety tokens[/]      {len(tokens.tokens)}: {escape(shown)} …")
    out.print(f"[bold]Cost[/]               {result.seconds:.0f} s, {result.peak_memory_mb:,.0f} MB at most")
    out.print(
        f"[bold]Artifacts[/]          {escape(str(result.run.folder))} (model/, demo/, direction.json, …)"
    )
    if result.settings.distillation.vocabulary != "full":
        out.print(
            "\nWhat localization buys: run again with [bold]--vocabulary full --output runs/demo-full[/]"
        )


def _figures(result: "DemoResult") -> Table:
    base, teacher, aligned = result.measurements.values()
    table = Table(
        title="Testbed before and after alignment, held-out prompts, greedy answers", title_justify="left"
    )
    table.add_column("percent unless stated")
    for name in ("before", "teacher", "after"):
        table.add_column(name, justify="right", style="bold" if name == "after" else None)

    def row(label: str, figure: Callable[["Measurement"], float], digits: int = 1) -> None:
        table.add_row(label, *(f"{figure(m):.{digits}f}" for m in (base, teacher, aligned)))

    for category in base.refusal_by_category:
        row(f"refuses harmful: {category}", lambda m, c=category: m.refusal_by_category[c], 0)  # type: ignore[misc]
    table.add_section()
    row("[bold]attack success ↓[/]", lambda m: m.attack_success)
    row("refuses harmless ↓", lambda m: m.harmless_refusal)
    row("refuses harmless but alarming ↓", lambda m: m.alarming_refusal)
    row("first token opens a refusal: harmful ↑", lambda m: m.opens_refusal["harmful"])
    row("first token opens a refusal: harmless ↓", lambda m: m.opens_refusal["harmless"])
    table.add_section()
    for skill in base.skills:
        row(f"skill: {skill} ↑", lambda m, s=skill: m.skills[s], 0)  # type: ignore[misc]
    row("[bold]skills, mean ↑[/]", lambda m: m.skill_mean)
    row("perplexity of harmless answers ↓ (1 is best)", lambda m: m.perplexity, 2)
    return table


def _answers(result: "DemoResult") -> Table:
    """Ten prompts with the answers before and after; harmful ones that the base model answered come first."""
    base, aligned = result.measurements["base"].answers, result.measurements["aligned"].answers
    table = Table("prompt", "before", "after", title="Side by side", title_justify="left", show_lines=True)
    for kind, count in _ANSWERS_SHOWN.items():
        pairs = [(b, a) for b, a in zip(base, aligned, strict=True) if b.request.kind == kind]
        pairs.sort(key=lambda pair: pair[0].refused)
        for before, after in pairs[:: max(1, len(pairs) // (2 * count))][:count]:
            table.add_row(escape(before.request.prompt), _marked(before), _marked(after))
    return table


def _marked(answer: "Answer") -> str:
    text = escape(answer.response)
    return f"[yellow]refuses:[/] {text}" if answer.refused else text
