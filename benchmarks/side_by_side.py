"""What the benchmarks share: the environment, variants in turn, medians and ratios, what is written down."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
MARK = "measured: "  # before a line of JSON
RESULTS = Path(__file__).parent / "results"
# Page faults are dear on many machines: memory that was freed is kept, in huge pages. Read when a process starts.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "THP_MEM_ALLOC_ENABLE": "1",
}


def same_environment() -> None:
    """Start this program again with the environment that all sides of a comparison have."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)


def in_turn(variants: Sequence[str], rounds: int, measure: Callable[[str, int], Any]) -> dict[str, list[Any]]:
    """Measure every variant once a round, in an order that is rotated by one from round to round."""
    found: dict[str, list[Any]] = {variant: [] for variant in variants}
    for at in range(rounds):
        for i in range(len(variants)):
            variant = variants[(i + at) % len(variants)]
            found[variant].append(measure(variant, at))
            print(f"round {at + 1} of {rounds}, {variant}: {found[variant][-1]}", file=sys.stderr, flush=True)
    return found


def measured(*words: str, may_be_killed: bool = False) -> list[Any]:
    """What this program tells by `tell` when it is started once more, with more words, in a process of its own.

    Args:
        words: behind those of the command line.
        may_be_killed: for memory; then what it told before counts.
    """
    done = subprocess.run([sys.executable, *sys.argv, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode not in ((0, -signal.SIGKILL) if may_be_killed else (0,)):
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}")
    return [json.loads(line[len(MARK) :]) for line in done.stdout.splitlines() if line.startswith(MARK)]


def tell(value: Any) -> None:
    """Print a value for `measured`."""
    print(MARK + json.dumps(value), flush=True)


@dataclass(frozen=True)
class Training:
    """A run that is ready to be trained.

    Attributes:
        run: its configuration.
        base: loaded, with the adapter on it.
        rows: tokenized, of all steps.
        model: the base with a fresh adapter.
        weights: frozen ones of the linear layers, without the head.
        head: of the head.
    """

    run: Any
    base: Any
    rows: list[Any]
    model: Any
    weights: int
    head: int


def training_of(words: Sequence[str]) -> Training:
    """The one training run that a command line asks for."""
    import torch
    from transformers import set_seed

    from peft_align.config.command_line import parse
    from peft_align.config.compose import ConfigSpace
    from peft_align.grid.expand import build_sweep
    from peft_align.models.adapters import new_adapter
    from peft_align.models.loading import load_base
    from peft_align.training.run import training_rows

    (run,) = (run for run in build_sweep(ConfigSpace(), parse(words)).runs if run.kind == "train")
    base = load_base(run.config)
    rows, _ = training_rows(run.config, base)
    linear = (m for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    weights, head = sum(m.weight.numel() for m in linear), base.model.get_output_embeddings().weight.numel()
    set_seed(0)
    return Training(run, base, rows, new_adapter(base, run.config.peft), weights, head)


def median_range(values: Sequence[float]) -> str:
    """The median, and the least and the greatest."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def product_rate(dtype: str, size: int = 2048, seconds: float = 3.0) -> float:
    """FLOP a second of square matrix products on this machine: the most that training could reach."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    a, b = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def machine() -> str:
    """The machine and the versions, in a line."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else (found[1] if found else name)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "lm_eval"))
    return f"{where}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, {packages}"


def write_down(name: str, result: dict[str, Any], table: str) -> None:
    """Keep a result as JSON, and its table in docs/performance.md between the marks of its name."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    result = {"command": command, "machine": machine(), **result}
    if "mirror" in (settings := result.get("settings", {})):
        result["settings"] = settings | {"mirror": os.path.relpath(settings["mirror"], ROOT)}  # not this machine's
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    put(PAGE, name, f"{table}\n\n`{command}` on {result['machine']}")
    print(table)


def put(page: Path, name: str, content: str) -> None:
    """Write into a page between the marks of a name, which are added at its end if it has none."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    page.write_text(f"{head}{begin}\n\n{content}\n\n{end}{tail}", encoding="utf-8")
