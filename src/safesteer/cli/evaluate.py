"""`safesteer evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from safesteer.console import RunConsole

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_ASKED, _JUDGED, _MORE, _RUN = "What is asked", "Who judges", "Capability and tax", "Run"


@app.command()
def evaluate(
    model_or_run: Annotated[
        str | None,
        typer.Argument(
            help="A run's folder (gives base, teacher and aligned), a model's or adapter's folder, or a hub id.",
            metavar="MODEL_OR_RUN",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="Several benchmarks at once: quick, paper, over-refusal, robustness, testbed or all; what of it cannot "
            "be had is left out. [dim]\\[default: quick][/]",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            help="One benchmark (see --list), perhaps as advbench+prefill10 or advbench+template3; may be repeated.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A file of prompts of your own; give --kind too.",
            metavar="FILE",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="Of --prompts: harmful (should be refused) or harmless (should be answered).",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            help="Folder of benchmark files, read before the hub.",
            metavar="DIR",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Sample at most so many prompts per benchmark.", rich_help_panel=_ASKED),
    ] = None,
    prefill: Annotated[
        list[int] | None,
        typer.Option(
            "--prefill",
            help="Ask the harmful benchmarks also with the first so many tokens of a compliant answer given; may be "
            "repeated.",
            metavar="TOKENS",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="Ask the harmful benchmarks also inside jailbreak templates: gptfuzzer, or a file of templates.",
            metavar="NAME|FILE",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Which models of a run: base, teacher or aligned, all by default; may be repeated.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help="NAME, NAME:MODEL or NAME@URL (see --list); may be repeated. "
            "[dim]\\[default: refusal-phrases, arditi-phrases][/]",
            rich_help_panel=_JUDGED,
        ),
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option(
            "--capability",
            help="A capability task, such as gsm8k (see --list); may be repeated.",
            metavar="TASK",
            rich_help_panel=_MORE,
        ),
    ] = None,
    alpaca_judge: Annotated[
        str | None,
        typer.Option(
            "--alpaca-judge",
            help="Who compares answers for --capability alpaca_eval: a chat model on an OpenAI-compatible server.",
            metavar="MODEL@URL",
            rich_help_panel=_MORE,
        ),
    ] = None,
    tax: Annotated[
        bool,
        typer.Option(
            "--tax",
            help="How far the model moved from the base model on harmless prompts: KL, top-1 agreement.",
            rich_help_panel=_MORE,
        ),
    ] = False,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Run the programs that the model writes for HumanEval, isolated.",
            rich_help_panel=_MORE,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder of records and summaries; what is there of the same evaluation is kept. "
            "[dim]\\[default: RUN/evaluation, or evaluations/MODEL][/]",
            metavar="DIR",
            rich_help_panel=_RUN,
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write every figure with its interval to this file.",
            metavar="FILE",
            rich_help_panel=_RUN,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Longest response, in tokens.", rich_help_panel=_RUN)
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 is greedy.", rich_help_panel=_RUN)
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", help="Of the random choice of prompts, templates and tokens.", rich_help_panel=_RUN
        ),
    ] = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Prompts at a time.", rich_help_panel=_RUN)
    ] = 32,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="cpu, cuda or mps; the best there is by default.", rich_help_panel=_RUN
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16, float16 or auto; the run's by default.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    thinking: Annotated[
        str | None,
        typer.Option(
            "--thinking",
            help="on or off, for models that can think; judges never see it.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            "--provider",
            help="Ask a served model through Inspect: openai, vllm, hf, …",
            rich_help_panel=_RUN,
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url",
            help="Where the served model is, such as http://localhost:8000/v1.",
            metavar="URL",
            rich_help_panel=_RUN,
        ),
    ] = None,
    list_: Annotated[
        bool,
        typer.Option("--list", help="List benchmarks, suites, judges and capability tasks, and stop."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Measure what a model refuses and what it answers: attack success, over-refusal, capability, tax.

    Responses are generated once and may be judged many times. The same command continues what was interrupted.

    [dim]safesteer evaluate runs/qwen3[/] — base, teacher and aligned model, a quick look

    [dim]safesteer evaluate runs/qwen3 --suite paper --limit 200 --judge llama-guard-3 --judge refusal-phrases[/]

    [dim]safesteer evaluate Qwen/Qwen3-4B-Instruct-2507 --prompts mine.txt --kind harmful[/]
    """
    from safesteer.cli.failures import reported

    with reported(debug=debug):
        from safesteer.cli.show_evaluation import show_evaluation, show_list
        from safesteer.evaluation.request import EvaluationRequest, run_request

        console = RunConsole(quiet=quiet)
        if list_:
            show_list(console)
            return
        if not debug:
            from safesteer.cli.options import quieten

            quieten()
        request = EvaluationRequest(
            model_or_run=model_or_run,
            suite=suite,
            benchmarks=tuple(benchmark or ()),
            prompts=prompts,
            kind=kind,
            data_dir=data_dir,
            limit=limit,
            prefills=tuple(prefill or ()),
            templates=template,
            models=tuple(model or ()),
            judges=tuple(judge or ()),
            capability=tuple(capability or ()),
            alpaca_judge=alpaca_judge,
            tax=tax,
            allow_code_execution=allow_code_execution,
            output=output,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            thinking=thinking,
            provider=provider,
            base_url=base_url,
        )
        summary = run_request(request, console)
        show_evaluation(console, summary, request.folder)
        if json is not None:
            from safesteer.artifacts import write_json

            write_json(json, summary.record())
