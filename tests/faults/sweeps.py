"""Runs small sweeps that something happens to, and compares what they leave with what an undisturbed one does."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from audit import Fault, changes_in

HERE = Path(__file__).parent
GRID = """
blocks:
  - name: main
    axes: {method: [sft, dpo], preference: [harmless, helpful]}
    set: {model: tiny, dataset: everyday, peft: lora}
  - name: merges
    kind: merge
    axes: {merge: [linear]}
    inputs:
      - [{method: sft, preference: harmless}, {method: dpo, preference: helpful}]
    set: {model: tiny, dataset: everyday, peft: lora, merge.save: adapter}
"""
WORDS = (
    "--config-dir", "mine", "+grid=faulty", "train.max_steps=3", "train.batch_size=2", "train.max_length=200",
    "train.checkpoint_steps=[1,3]", "train.state_every=1", "hub.mirror=mirror", "launcher.threads=1",
    "evaluation.benchmarks=[preference,everyday_mc,real_toxicity]", "evaluation.heldout=4", "evaluation.limit=3",
    "benchmark.real_toxicity.judge=profanity", "benchmark.real_toxicity.max_new_tokens=6",
)  # fmt: skip
RUNS = 6  # four trainings, a merge, a baseline
PROMPTS = ("You are a", "The stupid", "I hate", "Once upon", "Damn this", "Hello my")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# What differs from one time to the next without meaning anything: clocks, speeds, machines, who trained along.
OF_THE_CLOCK = {
    "seconds", "seconds_per_step", "tokens_per_second", "peak_memory_bytes", "finished", "provenance", "reference",
    "energy_joules", "joules", "created", "time", "host", "pid", "packed_with", "train_runtime", "seal",
    "command", "config_dirs", "measured", "disk",  # the last: whether free space is looked at before
}  # fmt: skip
TEMPORARY = re.compile(r"(?!runs/).*/\.[^/]*\.tmp")  # a killed writer leaves it; those of a run go when it is done
BESIDE = re.compile(  # what a disturbed sweep may leave besides
    r"sweeps/[^/]+/jobs/.*|runs/[^/]+/lease/.*|runs/[^/]+/history\.jsonl|(.*/)?lock|.*\.lock|runs/[^/]+/train\.log"
)


def prepare(folder: Path) -> Path:
    """A folder in which the sweep can be run: its grid and its data."""
    (folder / "mine/grid").mkdir(parents=True)
    (folder / "mine/grid/faulty.yaml").write_text(GRID)
    data = folder / "mirror/allenai/real-toxicity-prompts"
    data.mkdir(parents=True)
    rows = [{"prompt": {"text": text, "severe_toxicity": i / 10}} for i, text in enumerate(PROMPTS)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    told: str


@dataclass
class Server:
    """Starts commands as forks of a process that has imported everything."""

    cache: Path
    codes: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> Server:
        environment = {**os.environ, **ENVIRONMENT, "PEFT_ALIGN_CACHE": str(self.cache)}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")])
        self.log = (self.cache.parent / "server.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "preloaded.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment, text=True, bufsize=1,
        )  # fmt: skip
        assert self._line() == "ready", (self.cache.parent / "server.log").read_text()[-3000:]
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, verb: str, *words: str, fault: Fault | None = None, output: str = "told") -> Started:
        """Start a verb in a folder, with something that will happen to it."""
        fault = fault or Fault()
        fault.watch = fault.watch or [str(folder / "outputs"), str(self.cache)]
        fault.log = fault.log or str(folder / "changes")
        request = {"verb": verb, "words": list(words), "folder": str(folder), "output": str(folder / output)}
        request |= {"environment": ENVIRONMENT, "fault": asdict(fault)}
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        while True:
            answer = json.loads(self._line())
            if "started" in answer:
                return Started(self, folder / output, answer["started"])
            self.codes[answer["pid"]] = answer["code"]

    def code(self, pid: int) -> int:
        """Wait for a command."""
        while pid not in self.codes:
            answer = json.loads(self._line())
            self.codes[answer["pid"]] = answer["code"]
        return self.codes.pop(pid)

    def run(self, folder: Path, verb: str, *words: str, fault: Fault | None = None) -> Ended:
        """Start and wait."""
        (folder / "told").unlink(missing_ok=True)
        return self.start(folder, verb, *words, fault=fault).wait()


@dataclass
class Started:
    """A command that may still run."""

    server: Server
    output: Path
    pid: int

    def wait(self) -> Ended:
        code = self.server.code(self.pid)
        return Ended(code, self.output.read_text(errors="replace"))

    def workers(self) -> list[int]:
        return children(self.pid)

    def kill(self, who: str) -> None:
        """SIGKILL for the sweep, its workers, or both."""
        victims = [*(self.workers() if who != "sweep" else []), *([self.pid] if who != "worker" else [])]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The living children of a process."""
    with suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


# What is compared


def plain(value: Any) -> Any:
    """JSON without what differs from one time to the next."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if key not in OF_THE_CLOCK}
    return [plain(each) for each in value] if isinstance(value, list) else value


def content_of(path: Path) -> Any:
    """What must be the same in a product, however often the sweep was disturbed."""
    if path.suffix == ".json":
        content = plain(json.loads(path.read_text()))
        if path.name == "train.json":
            del content["metrics"]  # the size of a file with seconds in it
        return content
    if path.name == "metrics.jsonl":
        return [plain(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name.endswith(".jsonl.gz"):
        return gzip.decompress(path.read_bytes())
    if path.name == "results.csv":
        with path.open(newline="") as file:
            return [plain(row) for row in csv.DictReader(file)]
    if path.suffix in (".parquet", ".npz", ".md", ".pdf"):
        return None  # made of results.csv's rows; the order of what is in it; the date
    if path.name in ("cost.csv", "report.html"):
        return None  # what runs took, and when the page was written
    return hashlib.sha256(path.read_bytes()).hexdigest()


def products(root: Path) -> dict[str, Any]:
    """Everything under a root by its path that an undisturbed sweep would leave as well, and its content."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not BESIDE.fullmatch(name):
            found[name] = content_of(path)
    return found


def differences(root: Path, undisturbed: Mapping[str, Any]) -> list[str]:
    """What is lost, wrong or left over under a root."""
    found = products(root)
    lost = [f"lost: {name}" for name in undisturbed if name not in found]
    stray = [f"stray: {name}" for name in found if name not in undisturbed and not TEMPORARY.fullmatch(name)]
    wrong = [f"wrong: {name}" for name in found if name in undisturbed and found[name] != undisturbed[name]]
    return [*lost, *stray, *wrong]


Stamps = dict[str, tuple[int, int, str]]


def finished(root: Path) -> Stamps:
    """The products of whatever has a record: inode, time of change and digest of each file."""
    kept: Stamps = {}
    for run in (root / "runs").glob("*") if root.is_dir() else ():
        whole: list[Path] = []
        if readable(run / "train.json") and not readable(run / "attempt/train.json"):
            whole += [*run.glob("adapter/*"), *run.glob("checkpoints/*/*"), run / "metrics.jsonl", run / "train.json"]
        for record in run.glob("evaluations/**/record.json"):
            whole += [path for path in record.parent.iterdir() if path.is_file() and path.suffix != ".tmp"]
        for path in whole:
            if path.name != "unfinished.jsonl":  # a kill before its removal; its entries are in the record's samples
                stat = path.stat()
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                kept[path.relative_to(root).as_posix()] = (stat.st_ino, stat.st_mtime_ns, digest)
    return kept


def readable(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def touched(root: Path, kept: Stamps) -> list[str]:
    """Which of these files are not as they were."""
    now = finished(root)
    return [f"redone: {name}" for name, stamp in kept.items() if now.get(name) != stamp]


def trained_at_once(log: Path, root: Path) -> list[str]:
    """Runs in whose attempt two processes wrote in turn: one began before the other had ended with it."""
    order: dict[str, list[int]] = {}
    for pid, _, path in changes_in(log):
        match = re.match(
            re.escape(str(root / "runs")) + r"/([^/]+)/(attempt|state|state.new|adapter|checkpoints)\b", path
        )
        if match and order.setdefault(match[1], [0])[-1] != pid:
            order[match[1]].append(pid)
    return [f"double: {run}" for run, pids in order.items() if len(pids) != len(set(pids))]
