"""A real Slurm on this machine for tests, and what they ask of it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import missing

TINY = (
    "model=tiny", "dataset=everyday", "train.batch_size=2", "train.max_length=200",
    "evaluation.benchmarks=[preference]", "evaluation.heldout=4", "launcher.threads=1",
)  # fmt: skip
ON_SLURM = ("launcher=slurm", "launcher.signal_before=30")
# long enough to be disturbed in the middle
LONG = (*TINY, "method=sft", "peft=lora", "train.state_every=20")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Cluster:
    """A running cluster: the environment that clients need."""

    env: dict[str, str]

    def call(self, *words: str) -> str:
        """The output of a Slurm command."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def queue(self) -> dict[str, str]:
        """The state of every task that has not ended."""
        listed = self.call("squeue", "-h", "-r", "-o", "%i|%T").split()
        return dict(line.split("|") for line in listed)

    def wait(self, until: Callable[[], object], seconds: float = 300) -> None:
        """Wait until something holds."""
        deadline = time.time() + seconds
        while not until():
            assert time.time() < deadline, f"timed out; queue: {self.queue()}"
            time.sleep(0.3)

    def drained(self, seconds: float = 600) -> None:
        """Wait until no job is left."""
        self.wait(lambda: not self.queue(), seconds)


@contextmanager
def cluster(shared: Path, **settings: int) -> Iterator[Cluster]:
    """Start a cluster, and stop it in the end; the test is skipped where there is no Slurm.

    Args:
        shared: has tools/slurm-loopback.
        settings: of slurm-loopback, e.g. NODES=2.
    """
    tool = shared / "tools" / "slurm-loopback"
    if shutil.which("sbatch") is None or not tool.is_file():
        missing(f"needs Slurm: as root, {tool} install")
    own = {f"SLURM_LOOPBACK_{name}": str(given) for name, given in settings.items()}
    folder = Path(tempfile.mkdtemp(prefix="peft-align-slurm-"))
    folder.chmod(0o755)  # munge wants a path that everyone may walk: pytest's own folders are private
    env = {**os.environ, **own, "SLURM_LOOPBACK_DIR": str(folder)}
    started = subprocess.run(["bash", str(tool), "start"], env=env, capture_output=True, text=True, timeout=120)
    assert started.returncode == 0, started.stderr
    clean = {name: given for name, given in os.environ.items() if not name.startswith("SLURM_")}
    try:
        yield Cluster({**clean, "SLURM_CONF": str(folder / "etc" / "slurm.conf")})
    finally:
        subprocess.run(["bash", str(tool), "stop"], env=env, capture_output=True, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def verbs(slurm: Cluster, tmp_path: Path) -> Iterator[Run]:
    """Run a verb in an empty folder, with the cluster in reach; what it left in the queue is cancelled."""

    def run(name: str, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"peft_align.{name}", *words]
        told = {**slurm.env, **env}
        done = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=600)
        assert not check or done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    yield run
    for task in slurm.queue():
        slurm.call("scancel", task)
    slurm.drained(120)


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = (folder / "outputs/sweeps").glob("*/results.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_dirs(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "outputs/runs").iterdir() if not path.name.startswith("baseline"))


def kinds(run: Path) -> list[str]:
    """How it stopped, oldest first."""
    try:
        lines = (run / "history.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["kind"] for line in lines]


def trajectory(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def progress(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "progress.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def local(folder: Path, *words: str) -> None:
    """The same sweep on this machine, undisturbed."""
    folder.mkdir()
    command = [sys.executable, "-m", "peft_align.sweep", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def said_of(on_slurm: Run, words: list[str], run: Path) -> str:
    """What status says of a run."""
    states = json.loads(on_slurm("status", *words, "--json").stdout)["runs"]
    (state,) = (state for state in states if state["run_id"] == run.name)
    return f"{state['state']} {state['detail']}"
