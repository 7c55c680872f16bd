"""What `safesteer evaluate` prints: the tables at its end, and the lists of what there is."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from safesteer.console import RunConsole
from safesteer.evaluation.alpaca_eval import ALPACA_EVAL
from safesteer.evaluation.benchmark import Benchmark
from safesteer.evaluation.benchmarks import BENCHMARKS, SUITES
from safesteer.evaluation.capability_tasks import CAPABILITY_TASKS, CapabilityTask
from safesteer.evaluation.judges import DEFAULT_JUDGES, JUDGES, JudgeEntry
from safesteer.evaluation.phrase_lists import PHRASE_MATCHERS
from safesteer.evaluation.summary import EvaluationSummary
from safesteer.evaluation.summary_tables import capability_rows, kappa_text, rate_rows, tax_lines


def show_evaluation(console: RunConsole, summary: EvaluationSummary, folder: Path) -> None:
    """Print rates, changes, agreement and where everything is."""
    out = console.console
    if summary.rates:
        out.print(
            _table(
                "Percent, 95 % interval",
                ["benchmark", "judge"],
                summary.subjects,
                # One column less, for narrow terminals.
                [[f"{name}\n{measure}", *cells] for name, measure, *cells in rate_rows(summary)],
            )
        )
    if summary.capability:
        shown = [subject for subject in summary.subjects if subject in summary.capability]
        out.print(
            _table(
                "Capability, percent, 95 % interval",
                ["task"],
                shown,
                capability_rows(summary),
            )
        )
    for line in tax_lines(summary):
        out.print(f"Tax of {escape(line)}")
    for change in summary.changes:
        out.print(f"[bold]{escape(change.subject)}[/] {escape(change.sentence)}.")
    if summary.agreements:
        told = [entry for entry in summary.agreements if entry.kappa == entry.kappa]
        lowest = min(told, key=lambda entry: entry.kappa, default=None)
        if lowest is not None:
            out.print(
                f"Judges agree least on {escape(lowest.subject)}, {escape(lowest.benchmark)}: "
                f"κ {kappa_text(lowest.kappa)} ({escape(' / '.join(lowest.judges))}, n = {lowest.n})."
            )
    for note in summary.notes:
        console.note(note)
    where = escape(str(folder))
    out.print(
        f"\nEvery record and verdict is in [bold]{where}[/], the figures in {where}/summary.json, .csv and .md."
    )
    if summary.rates:
        out.print(f"To look into responses: inspect view --log-dir {where}/logs")


def show_list(console: RunConsole) -> None:
    """Print every suite, benchmark, judge and capability task."""
    _show_entries(
        console, "Suites: --suite NAME", {name: [", ".join(found)] for name, found in SUITES.items()}
    )
    benchmarks = {name: _benchmark_lines(entry) for name, entry in BENCHMARKS.items()}
    _show_entries(console, "Benchmarks: --benchmark NAME", benchmarks)
    _show_entries(
        console,
        "Harder forms of a benchmark: --benchmark NAME+FORM",
        {
            "+prefill10": [
                "The response is begun with the first 10 tokens of a compliant answer; any number."
            ],
            "+template3": ["Every prompt inside jailbreak template 3; any number, or -sample, or -all."],
        },
    )
    _show_entries(
        console, "Judges: --judge NAME", {name: _judge_lines(entry) for name, entry in JUDGES.items()}
    )
    tasks = {name: _task_lines(task) for name, task in CAPABILITY_TASKS.items()}
    tasks[ALPACA_EVAL] = [
        "AlpacaEval 2, length-controlled win rate against GPT-4 Turbo (arXiv 2404.04475)",
        "needs --alpaca-judge MODEL@URL",
    ]
    _show_entries(console, "Capability: --capability NAME", tasks)


def _benchmark_lines(entry: Benchmark) -> list[str]:
    wanted = "should be refused" if entry.kind == "harmful" else "should be answered"
    paper = f"arXiv {entry.citation}, " if entry.citation else ""
    config = f" ({entry.config})" if entry.config else ""
    fields = [name for name in (entry.prompt_field, entry.category_field, entry.id_field) if name]
    read = f"split {entry.split}, fields {', '.join(fields)}"
    if entry.hub_id is not None:
        source = f"from {entry.hub_id}{config}@{(entry.revision or '')[:10]}, {read}"
    elif entry.published is not None:
        source = f"from {entry.published}, fields {', '.join(fields)}"
    else:
        source = f"comes with safesteer, {read}"
    lines = [f"{entry.title}: {entry.size:,} prompts that {wanted} ({paper}{entry.licence})", source]
    if entry.local_paths:
        lines.append(f"below --data-dir: {entry.local_paths[0]}")
    lines.append(f"its authors judge by: {entry.authors_judge}")
    return [*lines, f"gated: {entry.gated}"] if entry.gated else lines


def _judge_lines(entry: JudgeEntry) -> list[str]:
    default = "default; " if entry.name in DEFAULT_JUDGES else ""
    refusals = "tells refusals" if entry.tells_refusals else "does not tell refusals"
    model = entry.model or (
        "needs no model" if entry.name in PHRASE_MATCHERS else "with a model of your choice"
    )
    lines = [f"{default}{model}; {refusals} ({entry.citation}, {entry.licence})"]
    return [*lines, entry.note] if entry.note else lines


def _task_lines(task: CapabilityTask) -> list[str]:
    paper = f" (arXiv {task.citation})" if task.citation else ""
    needs = ["--allow-code-execution"] if task.runs_code else []
    needs += [f"pip install 'lm-eval[{task.extra}]'"] if task.extra else []
    lines = [f"{task.title}{paper}: {task.notes}"]
    return [*lines, f"needs {' and '.join(needs)}"] if needs else lines


def _show_entries(console: RunConsole, title: str, entries: Mapping[str, Sequence[str]]) -> None:
    """Print names with what there is to say about them, legible on a narrow terminal."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, lines in entries.items():
        grid.add_row(escape(name), escape("\n".join(lines)))
    console.console.print(f"\n[bold underline]{escape(title)}[/]")
    console.console.print(grid)


def _table(
    title: str, names: list[str], subjects: list[str] | tuple[str, ...], rows: list[list[str]]
) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    for subject in subjects:
        # Wide enough for an interval: a figure must not be cut on a narrow terminal.
        table.add_column(subject, justify="right", min_width=len("(96.3–100.0)"), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
