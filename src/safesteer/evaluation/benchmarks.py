"""The benchmarks: what each is, where its prompts come from, under which licence, and which half counts as what.

Nothing is loaded here; `safesteer.evaluation.benchmark_files` does that. Revisions are commits of the hub's
datasets, so that a benchmark does not change under a published number.
"""

import operator
from importlib.resources import files

from safesteer.errors import SafeSteerError
from safesteer.evaluation.benchmark import Benchmark, Where
from safesteer.evaluation.records import Kind

_LOGIN = "accept the terms on https://huggingface.co/datasets/{}, then run `hf auth login`"


def _harmbench(name: str, title: str, config: str, size: int, notes: str) -> Benchmark:
    """One functional category of HarmBench."""
    return Benchmark(
        name=name,
        title=title,
        hub_id="walledai/HarmBench",
        config=config,
        revision="71c5e5411366e2ffff9b3a55fc47493d3aa56dfb",
        licence="MIT",
        prompt_field="prompt",
        category_field="category",
        id_field="BehaviorID",
        kind="harmful",
        size=size,
        authors_judge="HarmBench classifier (cais/HarmBench-Llama-2-13b-cls)",
        citation="2402.04249",
        gated=_LOGIN.format("walledai/HarmBench"),
        local_paths=("harmbench/harmbench_behaviors_text_all.csv",),
        where=Where(
            ("FunctionalCategory",),
            lambda category: category == config,
            f"FunctionalCategory is '{config}'",
            required=False,  # the hub has a configuration for each instead
        ),
        context_field="context" if config == "contextual" else None,
        local_names={"prompt": "Behavior", "category": "SemanticCategory", "context": "ContextString"},
        notes=notes,
    )


def _harmbench_split(name: str, title: str, local_path: str, size: int, notes: str) -> Benchmark:
    """HarmBench's two sorts of behaviors in one of its authors' splits, which are no hub dataset."""
    return Benchmark(
        name=name,
        title=title,
        published="github.com/centerforaisafety/HarmBench, data/behavior_datasets",
        licence="MIT",
        prompt_field="Behavior",
        category_field="FunctionalCategory",
        id_field="BehaviorID",
        kind="harmful",
        size=size,
        authors_judge="HarmBench classifier (cais/HarmBench-Llama-2-13b-cls)",
        citation="2402.04249",
        local_paths=(local_path,),
        where=Where(
            ("FunctionalCategory",),
            lambda category: category != "copyright",
            "FunctionalCategory is 'standard' or 'contextual'",
        ),
        context_field="ContextString",
        notes=notes,
    )


def _jailbreakbench(name: str, title: str, split: str, kind: Kind, judge: str, path: str) -> Benchmark:
    """One half of JailbreakBench's behaviours."""
    return Benchmark(
        name=name,
        title=title,
        hub_id="JailbreakBench/JBB-Behaviors",
        config="behaviors",
        revision="886acc352a31533ffbcf4ef22c744658688086fc",
        split=split,
        licence="MIT",
        prompt_field="Goal",
        category_field="Category",
        kind=kind,
        size=100,
        authors_judge=judge,
        citation="2404.01318",
        local_paths=(path,),
    )


def _xstest(name: str, title: str, label: str, kind: Kind, size: int) -> Benchmark:
    """One half of XSTest."""
    return Benchmark(
        name=name,
        title=title,
        hub_id="walledai/XSTest",
        revision="f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
        split="test",
        licence="CC-BY-4.0",
        prompt_field="prompt",
        category_field="type",
        kind=kind,
        size=size,
        authors_judge="people, and GPT-4 (full compliance, full refusal, partial refusal)",
        citation="2308.01263",
        gated=_LOGIN.format("walledai/XSTest"),
        local_paths=("xstest/xstest_prompts.csv",),
        where=Where(("label",), lambda value: value == label, f"label is '{label}'"),
    )


def _own(name: str, title: str, stem: str, kind: Kind) -> Benchmark:
    """Prompts that come with this package."""
    package_file = f"{stem}_test.jsonl"
    text = (files("safesteer.testbed") / "prompts" / package_file).read_text(encoding="utf-8")
    return Benchmark(
        name=name,
        title=title,
        split="test",
        licence="Apache-2.0",
        prompt_field="prompt",
        category_field="category",
        kind=kind,
        size=sum(bool(line.strip()) for line in text.split("\n")),
        authors_judge="refusal phrases",
        package_file=package_file,
        notes="Written for this project's testbed; comes with the package, so it has the package's version.",
    )


_ALL = (
    Benchmark(
        name="advbench",
        title="AdvBench harmful behaviors",
        hub_id="walledai/AdvBench",
        revision="9d4730540082fa4017450b65ca1c0e1d8d30446e",
        licence="MIT",
        prompt_field="prompt",
        kind="harmful",
        size=520,
        authors_judge="refusal phrases (the list published with GCG)",
        citation="2307.15043",
        gated=_LOGIN.format("walledai/AdvBench"),
        local_paths=("advbench/harmful_behaviors.csv",),
        local_names={"prompt": "goal"},
        notes="Many near-duplicates, nearly all phrased as orders ('Write …'): easy to overfit.",
    ),
    Benchmark(
        name="pku-saferlhf",
        title="PKU-SafeRLHF, unique prompts of the test split",
        hub_id="PKU-Alignment/PKU-SafeRLHF",
        revision="ff7ba91063016c78a225b0f74e1c0860bb18230f",
        licence="CC-BY-NC-4.0",
        prompt_field="prompt",
        kind="harmful",
        size=930,
        authors_judge="people; the safety labels of the dataset's own responses",
        citation="2406.15513",
        local_paths=("pku_saferlhf_test/prompts_unique.json",),
        where=Where(
            ("is_response_0_safe", "is_response_1_safe"),
            operator.ne,
            "exactly one of the two responses is labelled safe",
            required=False,  # the file of unique prompts is already so chosen
        ),
        hub_file="round0/test.jsonl.xz",
        notes="The 930 are the prompts of pairs with exactly one safe response. The revision (branch v0) is inferred "
        "from the number of pairs a prompt has; the hub's count was not verified. Some prompts are harmless as such.",
    ),
    _harmbench(
        "harmbench",
        "HarmBench, standard behaviors",
        "standard",
        200,
        "The 100 copyright behaviors are left out: they ask for reproduction and need a hash-based judge.",
    ),
    _harmbench(
        "harmbench-contextual",
        "HarmBench, contextual behaviors",
        "contextual",
        100,
        "The context is put before the behavior with a line '---' between, as the authors do.",
    ),
    _harmbench_split(
        "harmbench-validation",
        "HarmBench, validation split",
        "harmbench/harmbench_behaviors_text_val.csv",
        60,
        "To choose settings on, if `harmbench-test` is what is reported; standard and contextual behaviors are its categories.",
    ),
    _harmbench_split(
        "harmbench-test",
        "HarmBench, test split",
        "harmbench/harmbench_behaviors_text_test.csv",
        240,
        "What is left when the validation split, on which directions are often chosen, is set aside; its standard "
        "and contextual behaviors are its categories.",
    ),
    _jailbreakbench(
        "jailbreakbench",
        "JailbreakBench, harmful behaviors",
        "harmful",
        "harmful",
        "Llama-3-70B-Instruct with the authors' prompt",
        "jailbreakbench/harmful-behaviors.csv",
    ),
    Benchmark(
        name="sorry-bench",
        title="SORRY-Bench, base prompts",
        hub_id="sorry-bench/sorry-bench-202503",
        revision="612a4e1f45db8adf884fa62318ddf9fa1c6e75e9",
        licence="sorry-bench (its own, on the hub)",
        prompt_field="turns",
        category_field="category",
        id_field="question_id",
        kind="harmful",
        size=440,
        authors_judge="a fine-tuned Mistral-7B (sorry-bench/ft-mistral-7b-instruct-v0.2-sorry-bench-202406)",
        citation="2406.14598",
        gated="ask on https://huggingface.co/datasets/sorry-bench/sorry-bench-202503 (name, affiliation, country and "
        "purpose), then run `hf auth login`, or put its question.jsonl below --data-dir",
        local_paths=(
            "sorry_bench/question.jsonl",
            "sorry-bench/question.jsonl",
            "sorry-bench-202503/question.jsonl",
        ),
        where=Where(
            ("prompt_style",),
            lambda style: style == "base",
            "prompt_style is 'base'",
            required=False,  # the authors keep one file for each style
        ),
    ),
    Benchmark(
        name="harmfulqa",
        title="HarmfulQA",
        hub_id="declare-lab/HarmfulQA",
        revision="6f1a78aed47d16c0695e4595d0159abc38197bfd",
        licence="Apache-2.0",
        prompt_field="question",
        category_field="topic",
        kind="harmful",
        size=1960,
        authors_judge="GPT-4 (Red-Eval)",
        citation="2308.09662",
        local_paths=("harmfulqa/harmfulqa.json",),
        hub_file="data_for_hub.json",
        notes="Written by ChatGPT; some questions are harmless as such.",
    ),
    Benchmark(
        name="alert",
        title="ALERT",
        hub_id="Babelscape/ALERT",
        revision="07c47e3eb55079fdacabd35996f03b6cc1cd6eaf",
        licence="CC-BY-NC-SA-4.0 on the hub, CC-BY-SA-4.0 in the authors' repository",
        prompt_field="prompt",
        category_field="category",
        id_field="id",
        kind="harmful",
        size=14763,
        authors_judge="Llama Guard",
        citation="2404.08676",
        local_paths=("alert/alert.jsonl", "ALERT/alert.jsonl", "alert/ALERT.jsonl"),
        wrapping=("### Instruction:", "### Response:"),
        hub_file="alert.jsonl",
        notes="Its prompts come wrapped in '### Instruction: … ### Response:', which is taken off.",
    ),
    Benchmark(
        name="strongreject",
        title="StrongREJECT",
        hub_id="walledai/StrongREJECT",
        revision="df54272b395ce9e584d2f8140519935425d8549f",
        licence="MIT",
        prompt_field="prompt",
        category_field="category",
        kind="harmful",
        size=313,
        authors_judge="the StrongREJECT rubric (GPT-4), or its fine-tuned Gemma-2B",
        citation="2402.10260",
        gated=_LOGIN.format("walledai/StrongREJECT"),
        local_paths=("strongreject/strongreject_dataset.csv",),
        local_names={"prompt": "forbidden_prompt"},
    ),
    _xstest("xstest-safe", "XSTest, safe prompts", "safe", "harmless", 250),
    _xstest("xstest-unsafe", "XSTest, unsafe contrasts", "unsafe", "harmful", 200),
    Benchmark(
        name="or-bench-hard",
        title="OR-Bench hard 1k",
        hub_id="bench-llm/or-bench",
        config="or-bench-hard-1k",
        revision="e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
        licence="CC-BY-4.0",
        prompt_field="prompt",
        category_field="category",
        kind="harmless",
        size=1319,
        authors_judge="refusal phrases, and GPT-4",
        citation="2405.20947",
        local_paths=("or_bench/or-bench-hard-1k.csv", "or-bench/or-bench-hard-1k.csv"),
        notes="Written and filtered by language models; some prompts are arguably harmful.",
    ),
    _jailbreakbench(
        "jailbreakbench-benign",
        "JailbreakBench, benign behaviors",
        "benign",
        "harmless",
        "Llama-3-8B-Instruct with the authors' refusal prompt",
        "jailbreakbench/benign-behaviors.csv",
    ),
    _own("alarming", "safesteer's harmless but alarming requests", "alarming", "harmless"),
    _own("testbed-harmful", "safesteer's harmful requests", "harmful", "harmful"),
    _own("testbed-harmless", "safesteer's harmless requests", "harmless", "harmless"),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
"""Name to benchmark."""

SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("jailbreakbench", "xstest-unsafe", "xstest-safe", "jailbreakbench-benign", "alarming"),
    "paper": (
        "advbench",
        "pku-saferlhf",
        "harmbench",
        "jailbreakbench",
        "sorry-bench",
        "harmfulqa",
        "alert",
    ),
    # The unsafe half of XSTest is the contrast: a model that answers everything never over-refuses.
    "over-refusal": ("xstest-safe", "xstest-unsafe", "or-bench-hard", "jailbreakbench-benign", "alarming"),
    "robustness": (
        "strongreject",
        "strongreject+template-sample",
        "strongreject+prefill5",
        "strongreject+prefill10",
        "strongreject+prefill20",
    ),
    "testbed": ("testbed-harmful", "testbed-harmless", "alarming"),
    # HarmBench's splits are parts of HarmBench, which is there whole.
    "all": tuple(
        name
        for name in BENCHMARKS
        if name not in ("harmbench-validation", "harmbench-test") and not name.startswith("testbed-")
    ),
}
"""Suite to names of benchmarks, with variants where `safesteer.evaluation.variants` makes them."""


def benchmark_named(name: str) -> Benchmark:
    """Look up a benchmark.

    Raises:
        SafeSteerError: If there is none of this name.
    """
    if name not in BENCHMARKS:
        raise SafeSteerError(f"--benchmark {name}: no such benchmark; choose among {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]
