"""Worker processes on this machine: one a GPU, or one on the CPU."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live

from peft_align.config.schema import Local
from peft_align.grid.planner import Item, Planner, order
from peft_align.grid.runs import Sweep
from peft_align.grid.serialize import run_to_plain
from peft_align.launch.job import SOME_FAILED, STAGES
from peft_align.launch.watch import State, line, observe, summary, table
from peft_align.store.records import write_json
from peft_align.store.runs import RunDir

TICK = 0.5  # seconds between looks at the runs of the active workers
FULL_LOOK = 20  # ticks between looks at all runs: others may be at work on them
PLAIN_INTERVAL = 30.0  # seconds between progress lines where there is no terminal
GRACE = 10.0  # seconds a worker has to stop
# glibc gives freed memory back to the kernel and faults it in again at every step, which is dear on a CPU.
CPU_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "THP_MEM_ALLOC_ENABLE": "1",
}


@dataclass
class Job:
    """Runs that share a base, done by one process, once the runs `after` which it comes are no one's any more."""

    items: list[Item]
    after: frozenset[str] = frozenset()
    process: subprocess.Popen[bytes] | None = None
    slot: int = 0
    log: Path | None = None


@dataclass
class LocalLauncher:
    """Does a sweep's missing runs; `run` returns when nothing more can be done."""

    sweep: Sweep
    planner: Planner
    folder: Path
    stages: tuple[str, ...] = STAGES
    console: Console = field(default_factory=Console)
    _started: int = 0
    _states: list[State] = field(default_factory=list)
    _again: set[str] = field(default_factory=set)  # done runs that may turn out not to be

    def run(self, items: Sequence[Item]) -> list[State]:
        """Start the workers, show what they do, and return the state of every run at the end."""
        items = order(items)
        remade: set[str] = set()  # and what starts from those, which is looked at again
        for item in items:
            if item.to_make or remade & set(item.run.parents):
                remade.add(item.run.id)
        todo = [item for item in items if not item.done or item.run.id in remade]
        self._again = {item.run.id for item in todo if item.done}
        for item in todo:  # an earlier failure is tried again
            RunDir(self.planner.root, item.run.id).clear_state() if not self._held(item) else None
        gpus = visible_gpus()
        workers = self._config.workers or max(1, len(gpus))
        waiting = self._jobs(todo, workers)
        slots = list(range(workers))
        active: list[Job] = []
        begun, ticks = time.time(), 0
        self._states = self._observe(items, None)
        with self._display(begun) as show, stopping(active):
            while waiting or active or any(self._held(item) for item in todo):
                while slots and (job := _startable(waiting, active)):
                    waiting.remove(job)
                    job.slot = slots.pop(0)
                    self._start(job, gpus, workers)
                    active.append(job)
                time.sleep(TICK)
                for job in [job for job in active if job.process and job.process.poll() is not None]:
                    active.remove(job)
                    slots.append(job.slot)
                    waiting = [*self._bury(job), *waiting]
                ticks += 1
                busy = {item.run.id for job in active for item in job.items} if ticks % FULL_LOOK else None
                self._states = self._observe(items, busy)
                show(self._states)
            self._states = self._observe(items, None)
            show(self._states)
        return self._states

    @property
    def _config(self) -> Local:
        return self.sweep.config.launcher

    def _held(self, item: Item) -> bool:
        """Whether a process works on the run: one of ours, or another sweep's, which is waited for."""
        return RunDir(self.planner.root, item.run.id).is_locked()

    def _observe(self, items: Sequence[Item], only: set[str] | None) -> list[State]:
        """The state of every run; looked at anew are those in `only` (None: all) that are not done yet."""
        before = {state.run_id: state for state in self._states}
        states = []
        for item in items:
            known = before.get(item.run.id)
            settled = known is not None and known.state == "done" and item.run.id not in self._again
            keep = settled or (only is not None and item.run.id not in only)
            fresh = self.planner.item(item.run) if item.run.id in self._again else item
            states.append(known if known is not None and keep else observe(self.planner, fresh))
        return states

    def _jobs(self, items: Sequence[Item], workers: int) -> list[Job]:
        """Runs by base, parents with their children, cut so that every worker has something.

        Merges come after their inputs, in jobs of their own: their base is another one, and their inputs may be
        several workers'.
        """
        groups: dict[str, list[Item]] = {}
        for item in items:
            peft, kind = item.run.config.peft, item.run.kind == "merge"
            key = repr((item.run.config.model, peft.base_precision, peft.double_quantization, peft.compute_dtype, kind))
            groups.setdefault(key, []).append(item)
        jobs: list[Job] = []
        for group in groups.values():
            families = list(_families(group))
            size = math.ceil(len(families) / math.ceil(workers / len(groups)))
            for i in range(0, len(families), size):
                members = [item for family in families[i : i + size] for item in family]
                inputs = {parent for item in members if item.run.kind == "merge" for parent in item.run.parents}
                jobs.append(Job(members, frozenset(inputs)))
        return jobs

    def _start(self, job: Job, gpus: Sequence[str], workers: int) -> None:
        self._started += 1
        threads = self._config.threads or max(1, (os.cpu_count() or 1) // workers)
        path = self.folder / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._started:03d}.json"
        content = {
            "root": str(self.planner.root.resolve()),
            "sweep": self.folder.name,
            "stages": list(self.stages),
            "threads": threads,
            "runs": [run_to_plain(item.run) for item in job.items],
        }
        write_json(path, content)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[job.slot % len(gpus)]
        else:
            environment = {**CPU_MEMORY, **environment}
        job.log = path.with_suffix(".log")
        with job.log.open("ab") as log:
            job.process = subprocess.Popen(
                [sys.executable, "-m", "peft_align.launch.job", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _bury(self, job: Job) -> list[Job]:
        """If a worker died in the middle, record it for the run it was at; the runs after it get a new worker."""
        assert job.process is not None
        code = job.process.returncode
        if code in (0, SOME_FAILED):
            return []
        died = (
            f"the worker died: signal {signal.Signals(-code).name}"
            if code < 0
            else f"the worker died: exit code {code}"
        )
        directories = {item.run.id: RunDir(self.planner.root, item.run.id) for item in job.items}
        for directory in directories.values():
            progress = directory.progress()
            if progress is not None and progress.get("pid") == job.process.pid:
                directory.fail(str(progress["stage"]), died, log=str(directory.log))
        left = [i for i in job.items if directories[i.run.id].failure() is None and not self.planner.item(i.run).done]
        if len(left) < len(job.items):
            return [Job(left, job.after)] if left else []
        for item in left:  # it never came to a run: another worker would not either
            directories[item.run.id].fail("start", died, log=str(job.log))
        return []

    @contextmanager
    def _display(self, begun: float) -> Iterator[Callable[[list[State]], None]]:
        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=4, transient=True) as live:
                yield lambda states: live.update(table(states, begun))
            return
        shown: dict[str, str] = {}
        last = [0.0]

        def plain(states: list[State]) -> None:
            counts = Counter(state.state for state in states)
            due = time.time() - last[0] > PLAIN_INTERVAL
            for state in states:
                tag = f"{state.state} {state.detail}"
                if state.state == "waiting" or (
                    shown.get(state.run_id) == tag and not (due and state.state == "running")
                ):
                    continue
                if state.run_id in shown or state.state != "done":
                    print(f"[{counts['done']}/{len(states)}] {line(state)}", flush=True)
                shown[state.run_id] = tag
            if due:
                last[0] = time.time()

        yield plain
        print(summary(Counter(state.state for state in self._states)), flush=True)


def _startable(waiting: Sequence[Job], active: Sequence[Job]) -> Job | None:
    """The first job whose inputs no other job is going to make, or is making."""
    making = {item.run.id for job in (*waiting, *active) for item in job.items}
    return next((job for job in waiting if not job.after & making), None)


def _families(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Runs with their parents, so that one worker does them in order."""
    family: dict[str, list[Item]] = {}
    for item in items:
        members = next((family[parent] for parent in item.run.parents if parent in family), [])
        members.append(item)
        family[item.run.id] = members
    seen: set[int] = set()
    for members in family.values():
        if id(members) not in seen:
            seen.add(id(members))
            yield members


@contextmanager
def stopping(active: list[Job]) -> Iterator[None]:
    """Whatever ends the sweep, its workers are asked to stop, and made to after a while."""
    try:
        yield
    finally:
        processes = [job.process for job in active if job.process and job.process.poll() is None]
        for process in processes:
            process.terminate()
        deadline = time.time() + GRACE
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def visible_gpus() -> list[str]:
    """The CUDA devices this process may use, asked without torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(i) for i in range(listed.stdout.count("GPU "))] if listed.returncode == 0 else []
