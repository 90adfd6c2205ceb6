"""Trains one run by several processes at once, each on a GPU of its own; where there is none, on a share of the cores.

    python -m accelerate.commands.launch ... -m peft_align.launch.distributed FOLDER

The worker starts them, waits, and goes on alone: it holds the run's lock, evaluates, and records what failed. They and
the worker speak through a folder: JOB tells what to train, STOP asks to save the state and end, and each process leaves
there what it failed with. A signal would not do for STOP: accelerate's launcher ends its processes soon after one.

Limits: one machine.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peft_align.config.schema import NoTracker
from peft_align.errors import Fault, InputError
from peft_align.grid.runs import Run
from peft_align.grid.serialize import run_from_plain, run_to_plain
from peft_align.launch.outcome import details
from peft_align.launch.process import die_with_parent
from peft_align.models.loading import Base, load_base
from peft_align.store.records import keep_others_from_writing, read_json, write_json
from peft_align.store.runs import WORKER, RunDir
from peft_align.terminal import say, say_what_ends_us
from peft_align.training import processes
from peft_align.training.numerics import TrainingFailed
from peft_align.training.pack_runs import Member
from peft_align.training.run import Interrupted, train
from peft_align.training.tracking import tracking

JOB, STOP, FAILED = "job.json", "stop", "failed-{}.json"
TICK = 0.2  # seconds between looks at the processes
LOST = ("RuntimeError", "DistBackendError", "DistNetworkError")  # what it is to one process that another is gone
KNOWN = {kind.__name__: kind for kind in (Interrupted, TrainingFailed, MemoryError)}


def train_here(
    run: Run,
    directory: RunDir,
    base: Base,
    sweep: str,
    should_stop: Callable[[], bool],
    member: Member | None = None,
) -> None:
    """Train in this process, alone or as one of several; see training.run.train for what it raises."""
    tracker = run.config.tracker if processes.is_main() else NoTracker("none")
    with tracking(tracker, group=sweep, name=run.id, axes=run.axes, folder=directory.path / "tracking") as log:
        train(run, directory, base, log, should_stop, member)


def train_together(run: Run, directory: RunDir, sweep: str, count: int, should_stop: Callable[[], bool]) -> None:
    """Train in `count` new processes; raises what the first of them that failed raised.

    Args:
        run: what to train.
        directory: where it goes; the caller holds its lock.
        sweep: for the tracker.
        count: divides the batch.
        should_stop: asked all the while; if it says so, the state is saved and training ends.

    Besides:
        Lost: another worker took the run over; the processes are ended.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        what = f"a process has a GPU of its own, and this worker sees {torch.cuda.device_count()}"
        raise InputError([Fault(f"resources.gpus={count}", what, "see CUDA_VISIBLE_DEVICES")])
    gc.collect()
    torch.cuda.empty_cache()  # what is left of a base that the caller had
    threads = str(max(1, torch.get_num_threads() // count))
    with tempfile.TemporaryDirectory(prefix="peft-align-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_json(folder / JOB, {"root": str(directory.root.resolve()), "sweep": sweep, "run": run_to_plain(run)})
        launcher = subprocess.Popen(
            _command(count, folder),
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, WORKER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        try:
            while launcher.poll() is None:
                directory.check()
                if should_stop():
                    (folder / STOP).touch()
                time.sleep(TICK)
        finally:
            launcher.kill()  # its processes die with it
            launcher.wait()
        told = {rank: read_json(folder / FAILED.format(rank)) for rank in range(count)}
    silent = ", ".join(str(rank) for rank in told if told[rank] is None)
    first = min(filter(None, told.values()), key=lambda failure: failure["time"], default=None)  # others then missed it
    if launcher.returncode and silent and (first is None or first["type"] in LOST):
        rest = f"; another said: {first['text']}" if first else ""
        raise TrainingFailed(f"process {silent} of {count} died without a word, as when memory runs out{rest}")
    if first:
        raise _error(first)


def _command(count: int, folder: Path) -> list[str]:
    """The command line of accelerate's launcher. It says --multi_gpu of CPUs too: with --cpu, it starts one process."""
    words = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--gpu_ids", "all"]
    words += ["--main_process_port", "0"]  # a free one
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the trainer's own settings hold
    return [sys.executable, "-m", "accelerate.commands.launch", *words, "-m", __name__, str(folder)]


def _plain(error: Exception) -> dict[str, Any]:
    """What the worker needs to raise it again."""
    faults = [asdict(fault) for fault in error.faults] if isinstance(error, InputError) else []
    told = {"time": time.time(), "type": type(error).__name__, "text": str(error), "faults": faults}
    return told | {"details": details(error)}


def _error(told: dict[str, Any]) -> Exception:
    """The error that was told; of a kind that nobody here knows, one of the same name."""
    if told["faults"]:
        return InputError(Fault(**fault) for fault in told["faults"])
    kind: type[Exception] = KNOWN.get(told["type"]) or type(told["type"], (RuntimeError,), {})
    return kind(told["text"], told["details"]) if kind is TrainingFailed else kind(told["text"])


def main(argv: list[str]) -> int:
    """Be one of the processes."""
    die_with_parent()
    keep_others_from_writing()
    say_what_ends_us()
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # of a cluster, to all processes of a job
        signal.signal(signum, signal.SIG_IGN)  # the worker decides
    folder = Path(argv[0])
    try:
        _take_part(folder)
    except Interrupted as interrupted:
        write_json(folder / FAILED.format(os.environ["RANK"]), _plain(interrupted))
    except Exception as error:
        write_json(folder / FAILED.format(os.environ["RANK"]), _plain(error))
        say(traceback.format_exc(), file=sys.stderr, flush=True)
        return 1
    processes.wait_for_all()
    torch.distributed.destroy_process_group()
    return 0


def _take_part(folder: Path) -> None:
    from accelerate import PartialState

    job = read_json(folder / JOB)
    assert job is not None
    run = run_from_plain(job["run"])
    PartialState(cpu=not torch.cuda.is_available())  # finds the others, and gives this process its device
    base = load_base(run.config)
    train_here(run, RunDir(Path(job["root"]), run.id), base, job["sweep"], (folder / STOP).exists)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
