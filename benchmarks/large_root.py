"""How long the verbs take where a root holds many finished runs, and how that grows with their number.

    python benchmarks/large_root.py

Makes roots with 100, 1,000 and 5,000 finished runs (records as jobs write them, adapters of a few bytes, two
checkpoints and four evaluations each), and starts each verb in a process of its own: wall time, CPU time, and the most
memory that it held. Growth is the CPU time that a run more costs in the largest root against what it costs in the one
before: 1 is linear. Also the parts of which verbs are made, in one process. The table goes into docs/performance.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from side_by_side import measured, tell, write_down

PER_SEED = 10  # methods × ranks
GRID = """
name: large
blocks:
  - name: large
    axes: {{method: [sft, dpo], peft.r: [4, 8, 16, 32, 64], seed: {seeds}}}
    set:
      model: tiny
      dataset: everyday
      peft: lora
      train.max_steps: 4
      train.checkpoint_steps: [2, 4]
      evaluation.benchmarks: [preference, everyday_mc]
"""
VERBS = {
    "status": ["status", "+grid=large"],
    "status --json": ["status", "+grid=large", "--json"],
    "plan": ["plan", "+grid=large"],
    "plan --json": ["plan", "+grid=large", "--json"],
    "report": ["report", "+grid=large"],
    "report of 10 of them": ["report", "+grid=large", "seed=0"],
    "sweep, nothing to do": ["sweep", "+grid=large"],
    "clean, nothing removed": ["clean"],
}
METRICS = {
    "preference": ("accuracy", "response_loss", "reward_accuracy", "reward_margin"),
    "everyday_mc": ("acc", "acc_norm"),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Seconds and memory of each verb, by the number of finished runs.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 5_000], help="multiples of 10, ascending")
    parser.add_argument("--folder", help="where the roots are made and kept; one that is there is taken as it is")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)  # what a process of its own is to make
    parser.add_argument("--parts", type=int, help=argparse.SUPPRESS)  # or to take the time of
    return parser.parse_args()


def main() -> int:
    """Measure, print, write down."""
    given = arguments()
    if given.make:
        make(Path(given.folder), given.make)
        return 0
    if given.parts:
        tell(parts(Path(given.folder), given.parts))
        return 0
    found: dict[str, dict[str, Any]] = {}
    with folder_of(given.folder) as folder:
        for size in given.sizes:
            if not (folder / str(size) / "made").is_file():
                subprocess.run([sys.executable, __file__, "--folder", str(folder), "--make", str(size)], check=True)
            for name, words in VERBS.items():
                found.setdefault(name, {})[str(size)] = timed(folder / str(size), words)
                print(f"{size} runs, {name}: {found[name][str(size)]}", file=sys.stderr, flush=True)
            (told,) = measured("--folder", str(folder), "--parts", str(size))
            for name, seconds in told.items():
                found.setdefault(f"part: {name}", {})[str(size)] = {"cpu": seconds}
    head = ["", *(f"{size:,} runs: seconds (CPU time)" for size in given.sizes), "growth", "memory"]
    rows = [head, ["---"] * len(head)]
    for name, sizes in found.items():
        values = [sizes[str(size)] for size in given.sizes]
        shown = [
            f"{each['seconds']:.2f} ({each['cpu']:.2f})" if "seconds" in each else f"({each['cpu']:.2f})"
            for each in values
        ]
        peak = f"{values[-1]['bytes'] / 1e6:.0f} MB" if "bytes" in values[-1] else ""
        rows.append([name, *shown, growth(given.sizes, [each["cpu"] for each in values]), peak])
    write_down("large_root", {"measured": found}, "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return 0


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> str:
    """Seconds that a run more takes between the two largest sizes, by those between the two before: 1 is linear."""
    if len(sizes) < 3:
        return ""
    costs = [(seconds[i + 1] - seconds[i]) / (sizes[i + 1] - sizes[i]) for i in (-3, -2)]
    return f"{costs[1] / costs[0]:.2f}" if min(costs) > 0 else ""


@contextmanager
def folder_of(given: str | None) -> Iterator[Path]:
    """The folder that was asked for, or one that is gone afterwards."""
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given).resolve()
        return
    folder = tempfile.mkdtemp()
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


def words_of(folder: Path) -> list[str]:
    """What every command is told: where the grid is, where the runs are."""
    return [f"--config-dir={folder / 'conf'}", f"root={folder / 'outputs'}"]


def timed(folder: Path, words: Sequence[str]) -> dict[str, float]:
    """Wall time, CPU time, peak memory of a verb in a process of its own. This program stays small beside it."""
    command = [sys.executable, "-m", f"peft_align.{words[0]}", *words[1:], *words_of(folder)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | own_cache(folder))
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": round(seconds, 2), "cpu": round(cpu, 2), "bytes": usage.ru_maxrss * 1024}


def own_cache(folder: Path) -> dict[str, str]:
    """Nothing of this machine's cache has a part in what is measured."""
    return {"PEFT_ALIGN_CACHE": str(folder / "cache")}


def make(folder: Path, size: int) -> None:
    """A root with so many finished runs, written as jobs do but for the waiting until it is on the disk."""
    from peft_align.cli import ask
    from peft_align.grid.planner import Planner

    place = folder / str(size)
    shutil.rmtree(place, ignore_errors=True)
    (place / "conf/grid").mkdir(parents=True)
    text = GRID.format(seeds=list(range(size // PER_SEED)))
    (place / "conf/grid/large.yaml").write_text(text, encoding="utf-8")
    asked = ask(["+grid=large", *words_of(place)])
    for run in asked.sweep.runs:
        if run.kind == "train":
            finish_training(asked.root, run)
    for item in Planner(asked.root, None).plan(asked.sweep.runs):
        for request in item.requests:
            finish_evaluation(asked.root, item.run, request)
    assert all(item.done for item in asked.plan())
    (place / "made").touch()


def finish_training(root: Path, run: Any) -> None:
    """Leave what a training leaves."""
    from peft_align.grid.serialize import config_of
    from peft_align.store.records import digest_of
    from peft_align.store.runs import FORMAT, RunDir

    directory = RunDir(root, run.id)
    saved = {}
    for step in run.steps:
        folder = directory.checkpoint(step)
        files = {
            "adapter_model.safetensors": written(folder / "adapter_model.safetensors", f"{run.id} at {step}"),
            "adapter_config.json": written(folder / "adapter_config.json", "{}\n"),
        }
        saved[str(step)] = {"files": files, "digest": digest_of(files)}
    shutil.copytree(folder, directory.adapter, copy_function=os.link)
    steps = "".join(json.dumps({"step": i, "loss": 2.0, "learning_rate": 1e-4}) + "\n" for i in (1, 2, 3, 4))
    metrics = written(directory.path / "metrics.jsonl", steps)
    identity = {"id": run.id, "kind": run.kind, "axes": run.axes, "parents": list(run.parents)}
    written(directory.path / "run.json", json.dumps({**identity, "config": config_of(run)}, indent=1))
    written(directory.log, "step 1\n" * 50)
    written(directory.path / "lock", "")
    record = {
        "format": FORMAT,
        "run": run.id,
        "stage": "train",
        "checkpoints": saved,
        "metrics": {"metrics.jsonl": {"size": metrics["size"]}},
        "parents": {},
        "inputs": {},
        "samples": 64,
        "tokens": 12_800,
        "seconds": {"total": 10.0, "training": 8.0},
        "seconds_per_step": 2.0,
        "peak_memory_bytes": {"resident": 10**9, "gpu": None},
        "data": {"warning": None},
    }
    written(directory.path / "train.json", json.dumps(record, indent=1))


def finish_evaluation(root: Path, run: Any, request: Any) -> None:
    """Leave what one evaluation leaves."""
    from peft_align.config.benchmarks import PAIRED
    from peft_align.store.runs import FORMAT, RunDir

    folder = RunDir(root, run.id).evaluation(request.name)
    sample = written(folder / "samples.jsonl.gz", "samples")
    paired = request.config.kind in PAIRED
    values = {
        name: int(hashlib.sha256(f"{run.id}{name}".encode()).hexdigest()[:4], 16) for name in METRICS[request.benchmark]
    }
    metrics = [
        {
            "name": name,
            "value": v / 2**16,
            "stderr": 0.01,
            "n": 256,
            "higher_is_better": True,
            "part": "",
            "bound": None,
        }
        for name, v in values.items()
    ]
    record = {
        "format": FORMAT,
        "run": run.id,
        "stage": "evaluate",
        "step": request.step,
        "benchmark": request.benchmark,
        "base": run.base_of(request.scoring.base),
        "dataset": request.scoring.dataset_name if paired else None,
        "preference": request.scoring.preference_name if paired else None,
        "metrics": metrics,
        "key": request.key,
        "inputs": {},
        "files": {"samples.jsonl.gz": sample},
    }
    written(folder / "record.json", json.dumps(record, indent=1))


def written(path: Path, text: str) -> dict[str, Any]:
    """Write a file; returns what a record says of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def parts(folder: Path, size: int) -> dict[str, float]:
    """CPU time of what verbs are made of, one after the other in this process."""
    os.environ |= own_cache(folder / str(size))
    from peft_align.cli import ask
    from peft_align.launch.follow import cluster_states
    from peft_align.reporting.table import columns, markdown, rows, write_csv, write_parquet
    from peft_align.store.sweeps import write_manifest

    found: dict[str, float] = {}

    def take(name: str, what: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = what()
        found[name] = round(time.process_time() - started, 3)
        return result

    asked = take("from the words to the runs", lambda: ask(["+grid=large", *words_of(folder / str(size))]))
    sweep, root = asked.sweep, asked.root
    items = take("what is done, from the records", asked.plan)
    place = take("the sweep's folder", lambda: asked.folder)
    with tempfile.TemporaryDirectory() as name:
        ids = [run.id for run in sweep.runs]
        take("the manifest", lambda: write_manifest(Path(name), asked.line.words, asked.line.config_dirs, ids))
        take("states for status", lambda: cluster_states(asked.planner, items))
        table = take("the result table", lambda: rows(sweep, items, root))
        take("its summary", lambda: markdown(sweep, table))
        take("results.csv", lambda: write_csv(Path(name) / "results.csv", columns(sweep), table))
        take("results.parquet", lambda: write_parquet(Path(name) / "results.parquet", columns(sweep), table))
    assert place.parent.name == "sweeps"
    return found


if __name__ == "__main__":
    raise SystemExit(main())
