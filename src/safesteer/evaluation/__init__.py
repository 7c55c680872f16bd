"""Measure what a model refuses, what it answers and what it can do, before and after alignment.

The public names are imported when first used, so that `import safesteer.evaluation` does not wait for PyTorch.
"""

from typing import TYPE_CHECKING

from safesteer.lazy import lazy_names

if TYPE_CHECKING:
    from safesteer.evaluation.benchmark import Benchmark
    from safesteer.evaluation.benchmark_files import load_benchmark
    from safesteer.evaluation.benchmarks import BENCHMARKS, SUITES
    from safesteer.evaluation.capability import run_capability
    from safesteer.evaluation.compare import Comparison
    from safesteer.evaluation.judges import JUDGES, Judge, load_judge
    from safesteer.evaluation.records import EvaluationPrompt, Record, RecordFile, Verdict
    from safesteer.evaluation.runner import evaluate
    from safesteer.evaluation.statistics import cohens_kappa, paired_bootstrap, wilson_interval
    from safesteer.evaluation.subjects import Subject, subjects_of
    from safesteer.evaluation.summary import EvaluationSummary
    from safesteer.evaluation.tax import distributional_tax

_MODULES = {
    "BENCHMARKS": "benchmarks",
    "Benchmark": "benchmark",
    "Comparison": "compare",
    "EvaluationPrompt": "records",
    "EvaluationSummary": "summary",
    "JUDGES": "judges",
    "Judge": "judges",
    "Record": "records",
    "RecordFile": "records",
    "SUITES": "benchmarks",
    "Subject": "subjects",
    "Verdict": "records",
    "cohens_kappa": "statistics",
    "distributional_tax": "tax",
    "evaluate": "runner",
    "load_benchmark": "benchmark_files",
    "load_judge": "judges",
    "paired_bootstrap": "statistics",
    "run_capability": "capability",
    "subjects_of": "subjects",
    "wilson_interval": "statistics",
}

__all__ = [
    "BENCHMARKS",
    "JUDGES",
    "SUITES",
    "Benchmark",
    "Comparison",
    "EvaluationPrompt",
    "EvaluationSummary",
    "Judge",
    "Record",
    "RecordFile",
    "Subject",
    "Verdict",
    "cohens_kappa",
    "distributional_tax",
    "evaluate",
    "load_benchmark",
    "load_judge",
    "paired_bootstrap",
    "run_capability",
    "subjects_of",
    "wilson_interval",
]

__getattr__ = lazy_names(__name__, _MODULES)
