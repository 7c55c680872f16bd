"""What a benchmark's entry in the registry says (see `safesteer.evaluation.benchmarks`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from safesteer.errors import SafeSteerError
from safesteer.evaluation.records import Kind


class BenchmarkUnavailable(SafeSteerError):
    """What a benchmark is made of cannot be had here: no file, no access, no network.

    An error for a person who named the benchmark; of a suite it is left out, and said so.
    """


@dataclass(frozen=True)
class Where:
    """Which rows of a file belong to a benchmark.

    Attributes:
        fields: What is looked at.
        keeps: Called with the values of these fields; texts are stripped and lower-cased first.
        rule: The same in words.
        required: Whether a file without the fields is in error; otherwise all its rows are kept.
    """

    fields: tuple[str, ...]
    keeps: Callable[..., bool]
    rule: str
    required: bool = True


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: What `--benchmark` takes.
        title: The authors' name of it.
        licence: Of the prompts, as stated by the dataset's authors.
        prompt_field: Holds the prompt, on the hub; `local_names` says how the authors' own files call it. Upper
            and lower case do not matter in any field's name.
        kind: Whether its prompts should be refused or answered.
        size: How many prompts the authors publish.
        authors_judge: What the authors judge responses with.
        hub_id: The dataset on the hub, None if it is not there.
        published: Where its authors publish the file, if not on the hub.
        config: The hub dataset's configuration.
        revision: The hub dataset's commit.
        split: Of the hub dataset.
        category_field: Holds the category, None if there is none.
        id_field: Holds an id, None if rows are numbered instead.
        citation: The arXiv number of the paper.
        gated: How to get access, None if anybody has it.
        local_paths: Where the file is below `--data-dir`; the first that exists is read.
        where: Which rows count, None for all.
        context_field: Holds a text that the prompt refers to and that is put before it, in HarmBench's format.
        wrapping: A beginning and an end that are taken off every prompt, because a chat template takes their place.
        hub_file: The one file of the hub dataset that is loaded, None for its configuration's.
        package_file: The file below `safesteer/testbed/prompts`, for the project's own prompts.
        local_names: Field name on the hub to name in the authors' own files, where they differ.
        notes: What one should know about it.
    """

    name: str
    title: str
    licence: str
    prompt_field: str
    kind: Kind
    size: int
    authors_judge: str
    hub_id: str | None = None
    published: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    category_field: str | None = None
    id_field: str | None = None
    citation: str | None = None
    gated: str | None = None
    local_paths: tuple[str, ...] = ()
    where: Where | None = None
    context_field: str | None = None
    wrapping: tuple[str, str] | None = None
    hub_file: str | None = None
    package_file: str | None = None
    local_names: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""

    def names_of(self, name: str) -> tuple[str, ...]:
        """Return what a field is called: on the hub, then in the authors' own files."""
        return (name, self.local_names[name]) if name in self.local_names else (name,)
