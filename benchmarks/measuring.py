"""What the benchmarks share: random models, times side by side, peak memory, the machine, one file of results."""

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

RESULTS = Path(__file__).parent / "results.json"


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a benchmark's module documentation."""
    return argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def random_qwen3(
    layers: int, hidden: int, vocabulary: int, heads: int = 8, key_value_heads: int = 4, **config: Any
) -> Qwen3ForCausalLM:
    """Return a Qwen3 of random weights, the same at every call.

    Args:
        layers: Decoder layers.
        hidden: Hidden size; the MLP's is three times it.
        vocabulary: Tokens.
        heads: Of queries.
        key_value_heads: Of keys and values.
        config: Further fields of `transformers.Qwen3Config`.
    """
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden // heads,
        tie_word_embeddings=True,
        **config,
    )
    return Qwen3ForCausalLM(shape).eval()


def side_by_side(
    work: Mapping[str, Callable[[], object]], rounds: int = 5, warm_up: int = 1
) -> dict[str, float]:
    """Time pieces of work in turns, so that whatever else the machine does hits all alike.

    Args:
        work: By name; each is called `warm_up + rounds` times.
        rounds: Timed calls.
        warm_up: Untimed calls before them.

    Returns:
        Median seconds by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm_up + rounds):
        for name, run in work.items():
            _synchronize()
            started = time.perf_counter()
            run()
            _synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_extra_memory(run: Callable[[], object]) -> float:
    """Return how much more memory than before `run` held at its peak, in MB: the GPU's if there is one.

    On a CPU it is the process's resident memory, read every millisecond.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    page = os.sysconf("SC_PAGE_SIZE")
    statm = Path("/proc/self/statm")
    done = threading.Event()

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    before = peak = resident()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return (peak - before) / 1e6


def machine() -> dict[str, Any]:
    """Describe what the figures were taken on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record(benchmark: str, entries: list[dict[str, Any]]) -> None:
    """Print a benchmark's figures and put them in `results.json`, in place of its earlier ones.

    Args:
        benchmark: Its name, the file's.
        entries: One a figure: `name`, `ours`, `reference`, `ratio` (ours / reference), and what else it has to say.
    """
    kept = json.loads(RESULTS.read_text())["figures"] if RESULTS.exists() else []
    figures = [entry for entry in kept if entry["benchmark"] != benchmark]
    figures += [{"benchmark": benchmark, **entry} for entry in entries]
    figures.sort(key=lambda entry: entry["benchmark"])
    RESULTS.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")
    for entry in entries:
        print(
            f"{entry['name']:<64} ours {entry['ours']:>10.3f}  reference {entry['reference']:>10.3f}  "
            f"ratio {entry['ratio']:.3f}",
            flush=True,
        )


def figure(name: str, ours: float, reference: float, unit: str, **more: Any) -> dict[str, Any]:
    """One entry of `results.json`."""
    return {
        "name": name,
        "ours": round(ours, 4),
        "reference": round(reference, 4),
        "ratio": round(ours / reference, 4),
        "unit": unit,
        **more,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
