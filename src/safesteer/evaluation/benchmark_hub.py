"""A benchmark's rows from the hub, at the commit that the registry pins."""

from pathlib import Path

from safesteer.errors import one_line
from safesteer.evaluation.benchmark import Benchmark, BenchmarkUnavailable
from safesteer.prompt_files import Row


def hub_rows(benchmark: Benchmark, data_dir: str | Path | None) -> list[Row]:
    """Load a benchmark from the hub.

    Args:
        benchmark: Which.
        data_dir: Where it was not found before, for the message.

    Raises:
        BenchmarkUnavailable: If it is not on the hub, needs access that is not granted, or the hub cannot be reached.
    """
    where = "no --data-dir is given" if data_dir is None else f"not below --data-dir {data_dir}"
    if benchmark.hub_id is None:
        raise BenchmarkUnavailable(
            f"{benchmark.name}: {where}, and it is not on the hub; put {benchmark.local_paths[0]} (from "
            f"{benchmark.published}) below --data-dir."
        )
    from datasets import load_dataset

    try:
        dataset = load_dataset(
            benchmark.hub_id,
            benchmark.config,
            data_files=benchmark.hub_file,
            split=benchmark.split,
            revision=benchmark.revision,
        )
        rows = [dict(fields) for fields in dataset]
    # The hub client raises many kinds (HTTP, gating, offline, missing splits); all mean that it cannot be had.
    except Exception as error:
        access = f"; it is gated: {benchmark.gated}" if benchmark.gated else ""
        raise BenchmarkUnavailable(
            f"{benchmark.name}: {where} and {benchmark.hub_id} cannot be loaded from the hub "
            f"({one_line(error, 120)}); put {benchmark.local_paths[0]} below --data-dir, or go online{access}."
        ) from error
    return [Row("row", number, fields=fields) for number, fields in enumerate(rows, start=1)]
