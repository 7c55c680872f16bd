"""An evaluation as a person asks for it: checked, its parts named, and run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from safesteer.console import RunConsole
from safesteer.errors import SafeSteerError
from safesteer.evaluation.alpaca_eval import ALPACA_EVAL
from safesteer.evaluation.benchmark_files import LoadedPrompts, check_data_dir, check_limit, own_prompts
from safesteer.evaluation.benchmarks import BENCHMARKS, SUITES
from safesteer.evaluation.beyond_safety import (
    check_capability,
    check_local,
    check_tax,
    ready_alpaca_judge,
    with_alpaca_eval,
    with_capability,
    with_tax,
)
from safesteer.evaluation.generation import Decoding
from safesteer.evaluation.judges import DEFAULT_JUDGES, load_judge
from safesteer.evaluation.records import Kind
from safesteer.evaluation.runner import evaluate
from safesteer.evaluation.subjects import AnySubject, Role, Subject, served, slug, subjects_of
from safesteer.evaluation.summary import EvaluationSummary
from safesteer.evaluation.summary_tables import skipped_lines
from safesteer.evaluation.variants import load_variants, variant_named


@dataclass(frozen=True)
class EvaluationRequest:
    """What `safesteer evaluate` was given; the attributes are its flags, None or empty where not given."""

    model_or_run: str | None
    suite: str | None = None
    benchmarks: tuple[str, ...] = ()
    prompts: Path | None = None
    kind: str | None = None
    data_dir: Path | None = None
    limit: int | None = None
    prefills: tuple[int, ...] = ()
    templates: str | None = None
    models: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    capability: tuple[str, ...] = ()
    alpaca_judge: str | None = None
    tax: bool = False
    allow_code_execution: bool = False
    output: Path | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 32
    device: str | None = None
    dtype: str | None = None
    thinking: str | None = None
    provider: str | None = None
    base_url: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not self.model_or_run:
            if self.models:
                raise SafeSteerError(
                    "no model was named, for --model chooses parts of a run; name it without a flag: safesteer evaluate "
                    f"{self.models[0]}."
                )
            raise SafeSteerError("no model was named; give a run's folder, a model's folder or a hub id.")
        if self.suite is not None and self.suite not in SUITES:
            raise SafeSteerError(f"--suite {self.suite}: there is none; choose among {', '.join(SUITES)}.")
        for name in self.benchmarks:
            if name in SUITES:
                raise SafeSteerError(f"--benchmark {name}: is a suite; write --suite {name}.")
            if variant_named(name).benchmark not in BENCHMARKS:
                raise SafeSteerError(
                    f"--benchmark {name}: there is none; choose among {', '.join(BENCHMARKS)}, or give a file with "
                    "--prompts."
                )
        for name in self.names:
            variant_named(name)
        if (self.prompts is None) != (self.kind is None):
            raise SafeSteerError("--prompts and --kind belong together; give both or neither.")
        if self.kind not in (None, "harmful", "harmless"):
            raise SafeSteerError(f"--kind is {self.kind!r}; give harmful or harmless.")
        if self.thinking not in (None, "on", "off"):
            raise SafeSteerError(f"--thinking is {self.thinking!r}; give on or off.")
        if self.base_url is not None and self.provider is None:
            raise SafeSteerError("--base-url is of a served model; name its --provider too, such as openai.")
        if self.provider is not None and self.models:
            raise SafeSteerError(
                "--model chooses parts of a run, which a served model has none of; leave it out."
            )
        Decoding(self.max_new_tokens, self.temperature, self.seed, self.batch_size)
        check_limit(self.limit)
        check_data_dir(self.data_dir)
        for name in self.judges:
            load_judge(name)
        check_capability(
            self.tasks, allow_code_execution=self.allow_code_execution, alpaca_judge=self.alpaca_judge
        )

    @property
    def folder(self) -> Path:
        """Where records and summaries go."""
        if self.output is not None:
            return self.output
        name = str(self.model_or_run)
        if self.provider is None and (Path(name) / "config.yaml").is_file():
            return Path(name) / "evaluation"
        return Path("evaluations") / slug(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The benchmarks asked for, each harmful one followed by its variants."""
        return tuple(dict.fromkeys(self._with_variants([*self._of_suite, *self.benchmarks])))

    @property
    def optional(self) -> frozenset[str]:
        """The benchmarks of the suite that nobody named: what cannot be had of them is left out."""
        return frozenset(self._with_variants(self._of_suite)).difference(self._with_variants(self.benchmarks))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The capability tasks asked for; "alpaca-eval" is as good as "alpaca_eval"."""
        return tuple(dict.fromkeys(name.replace("-", "_") for name in self.capability))

    @property
    def _of_suite(self) -> tuple[str, ...]:
        if self.suite is not None:
            return SUITES[self.suite]
        return () if self.benchmarks or self.prompts or self.capability or self.tax else SUITES["quick"]

    def _with_variants(self, plain: Sequence[str]) -> list[str]:
        names = []
        for name in plain:
            names.append(name)
            variant = variant_named(name)
            if BENCHMARKS[variant.benchmark].kind == "harmful" and name == variant.benchmark:
                names += [f"{name}+prefill{tokens}" for tokens in self.prefills]
                names += [f"{name}+template-sample"] if self.templates is not None else []
        return names


def run_request(request: EvaluationRequest, console: RunConsole) -> EvaluationSummary:
    """Evaluate what was asked for.

    Raises:
        SafeSteerError: As `evaluate`, `run_capability`, `alpaca_eval` and `distributional_tax`.
    """
    prompts: dict[str, LoadedPrompts] = {}
    if request.prompts is not None:
        prompts[f"own-{slug(request.prompts.stem)}"] = own_prompts(
            request.prompts, cast(Kind, request.kind), limit=request.limit, seed=request.seed
        )
    with console.working("loading the model"):
        subjects = _subjects(request)
    check_local(subjects, request.tasks)
    if request.tax:
        check_tax(subjects)
    alpaca_judge = None
    if request.alpaca_judge is not None:
        alpaca_judge = ready_alpaca_judge(request.alpaca_judge, request.data_dir)
    local = [subject for subject in subjects if isinstance(subject, Subject)]
    with console.working("loading prompts"):
        loaded, skipped = load_variants(
            request.names,
            optional=request.optional,
            data_dir=request.data_dir,
            limit=request.limit,
            seed=request.seed,
            tokenizer=local[0].chat.tokenizer if local else None,
            templates=request.templates or "gptfuzzer",
        )
    for line in skipped_lines(skipped):
        console.note(line)
    prompts = loaded | prompts
    if skipped and not (prompts or request.tasks or request.tax):
        raise SafeSteerError(
            f"--suite {request.suite or 'quick'}: none of {', '.join(skipped)} can be had here; give --data-dir with "
            "their files, or go online."
        )
    with console.stage("evaluation") as progress:
        summary = evaluate(
            subjects,
            prompts,
            request.judges or DEFAULT_JUDGES,
            request.folder,
            limit=request.limit,
            seed=request.seed,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            batch_size=request.batch_size,
            progress=progress,
        )
    summary = replace(summary, skipped=skipped)
    of_lm_eval = [name for name in request.tasks if name != ALPACA_EVAL]
    if of_lm_eval:
        with console.stage("capability") as progress:
            summary = with_capability(
                summary,
                subjects,
                of_lm_eval,
                request.folder,
                data_dir=request.data_dir,
                limit=request.limit,
                batch_size=request.batch_size,
                allow_code_execution=request.allow_code_execution,
                seed=request.seed,
                progress=progress,
            )
    if alpaca_judge is not None:
        with console.stage("AlpacaEval") as progress:
            summary = with_alpaca_eval(
                summary,
                subjects,
                alpaca_judge,
                request.folder,
                data_dir=request.data_dir,
                limit=request.limit,
                batch_size=request.batch_size,
                seed=request.seed,
                progress=progress,
            )
    if request.tax:
        with console.stage("tax") as progress:
            summary = with_tax(
                summary,
                subjects,
                limit=request.limit,
                batch_size=request.batch_size,
                seed=request.seed,
                progress=progress,
            )
    summary.write(request.folder)
    return summary


def _subjects(request: EvaluationRequest) -> tuple[AnySubject, ...]:
    name = str(request.model_or_run)
    if request.provider is not None:
        return (served(f"{request.provider}/{name}", request.base_url),)
    return subjects_of(
        name,
        cast(tuple[Role, ...], request.models) or None,
        device=request.device,
        dtype=request.dtype,
        thinking=cast(Any, request.thinking),
    )
