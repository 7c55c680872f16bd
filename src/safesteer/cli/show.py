"""What commands print at their end: tables and paths."""

import math
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from safesteer.console import RunConsole
from safesteer.settings import Settings

if TYPE_CHECKING:
    from safesteer.direction import RefusalDirection
    from safesteer.memory_estimate import MemoryEstimate
    from safesteer.pipeline import AlignmentRun
    from safesteer.plan import Plan
    from safesteer.safety_tokens import SafetyTokens
    from safesteer.training_stage import AlignedModel

_GIB, _MIB = 2**30, 2**20
_SHOWN_TOKENS = 20


def show_plan(console: RunConsole, settings: Settings, plan: "Plan") -> None:
    """Print what a run would do, with which settings, in how much memory."""
    out = console.console
    out.print("[bold]Settings[/]")
    out.print(Syntax(settings.yaml().strip(), "yaml", background_color="default", word_wrap=True))
    stages = Table("stage", "what it would do", title="Plan", title_justify="left")
    for name, what in plan.stages:
        stages.add_row(name, what)
    out.print(stages)
    out.print(_memory_table(plan.memory))
    if plan.advice is not None:
        out.print(f"[red]{escape(plan.advice)}[/]")
    if plan.present:
        present = ", ".join(plan.present)
        out.print(f"In {escape(settings.run.output)} already, kept if its inputs are unchanged: {present}")
    out.print(f"[bold]{plan.steps}[/] optimizer steps. Nothing was loaded or written.")


def show_direction(console: RunConsole, direction: "RefusalDirection") -> None:
    """Print the candidates that came closest, the chosen one first."""
    order = {"selected": 0, "eligible": 1}
    ranked = sorted(
        direction.candidates,
        key=lambda score: (
            order.get(score.verdict, 2),
            _last_if_nan(score.ablation_refusal),
            _last_if_nan(-score.induction),
        ),
    )
    table = Table(
        "layer",
        "position",
        "ablation",
        "induction",
        "KL",
        "verdict",
        title="Best candidates",
        title_justify="left",
    )
    for score in ranked[:8]:
        numbers = (score.ablation_refusal, score.induction, score.kl)
        table.add_row(
            str(score.layer),
            str(score.position),
            *(f"{number:.3g}" for number in numbers),
            escape(score.verdict),
        )
    console.console.print(table)
    openers = " ".join(repr(text) for text in direction.openers.texts)
    console.console.print(f"Refusals open with: {escape(openers)}")


def show_tokens(console: RunConsole, tokens: "SafetyTokens") -> None:
    """Print the first safety tokens, with their votes and probabilities."""
    table = Table("token", "votes", "teacher", "base", title="Safety tokens", title_justify="left")
    for token in tokens.tokens[:_SHOWN_TOKENS]:
        table.add_row(
            escape(repr(token.text)),
            str(token.votes),
            f"{token.teacher_probability:.2%}",
            f"{token.base_probability:.2%}",
        )
    console.console.print(table)
    if len(tokens.tokens) > _SHOWN_TOKENS:
        console.console.print(f"… and {len(tokens.tokens) - _SHOWN_TOKENS} more.")


def show_model(console: RunConsole, model: "AlignedModel") -> None:
    """Print where the model is and how to load it."""
    folder = escape(str(model.folder))
    console.console.print(
        f"\nThe aligned model is in [bold]{folder}[/], its card in {folder}/README.md. To load it:\n"
    )
    console.console.print(
        f'    from safesteer.loading import load_model\n    model = load_model("{folder}")\n'
    )


def show_run(console: RunConsole, run: "AlignmentRun") -> None:
    """Print what a finished run left where."""
    show_model(console, run.model)


def _memory_table(memory: "MemoryEstimate") -> Table:
    unit, name_of_unit = (_GIB, "GiB") if memory.peak >= _GIB else (_MIB, "MiB")
    table = Table(
        "memory", name_of_unit, title=f"Memory estimate on {escape(memory.device)}", title_justify="left"
    )
    table.columns[1].justify = "right"
    rows = [
        ("weights", memory.weights),
        ("teacher's copy of them", memory.teacher_copy),
        ("adapter", memory.adapter),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        (f"activations, while training on {memory.micro_batch} at a time", memory.activations),
        (f"keys and values, while sampling {memory.rollout_batch} at a time", memory.rollout_cache),
    ]
    for name, size in rows:
        if size:
            table.add_row(name, f"{size / unit:.2f}")
    table.add_section()
    table.add_row("[bold]most at a time[/]", f"[bold]{memory.peak / unit:.2f}[/]")
    if memory.available is not None:
        color = "green" if memory.passes_fit and memory.sampling_fits else "red"
        table.add_row("the device has", f"[{color}]{memory.available / unit:.0f}[/]")
    return table


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
