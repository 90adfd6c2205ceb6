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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.live import Live

from peft_align.config.launchers import Local
from peft_align.errors import DISK_FAULTS
from peft_align.grid.needs import processes
from peft_align.grid.order import order, remade
from peft_align.grid.planner import Item, Planner
from peft_align.grid.runs import STAGES, Sweep
from peft_align.launch.job import SOME_FAILED
from peft_align.launch.job_file import content
from peft_align.launch.outcome import note_end_of_earlier
from peft_align.launch.process import DISK
from peft_align.launch.watch import State, line, observe, summary, table
from peft_align.store.records import write_json
from peft_align.store.runs import RunDir
from peft_align.terminal import plain_console, say

TICK = 0.5  # seconds between looks at the runs of the active workers
FULL_LOOK = 20  # ticks between looks at all runs: others may be at work on them
PLAIN_INTERVAL = 30.0  # seconds between progress lines where there is no terminal
GRACE = 60.0  # seconds a worker has to end its training step and save the state; a second interruption waits for none
# glibc gives freed memory back to the kernel and faults it in again at every step, which is dear on a CPU.
CPU_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "THP_MEM_ALLOC_ENABLE": "1",
}


@dataclass
class Job:
    """Stages of runs, done by one process.

    Attributes:
        items: runs that share a base, or a judge.
        stages: what is done of them.
        judges: of the stage judge: the options that judge.
        after: runs that no other job may be at, or going to be at, when it starts.
        device: whether it needs a device; a judge behind an API does not, and waits for none.
    """

    items: list[Item]
    stages: tuple[str, ...]
    judges: tuple[str, ...] | None = None
    after: frozenset[str] = frozenset()
    device: bool = True
    process: subprocess.Popen[bytes] | None = None
    slot: int | None = None
    log: Path | None = None


@dataclass
class LocalLauncher:
    """Does a sweep's missing runs; `run` returns when nothing more can be done."""

    sweep: Sweep
    planner: Planner
    folder: Path
    stages: tuple[str, ...] = STAGES
    console: Console = field(default_factory=plain_console)
    _started: int = 0
    _together: int = 1  # processes that train a run together, each on a GPU
    _states: list[State] = field(default_factory=list)
    _again: set[str] = field(default_factory=set)  # done runs that may turn out not to be
    _changes: dict[str, int] = field(default_factory=dict)  # when a run's folder changed, as it was last looked at

    def run(self, items: Sequence[Item]) -> list[State]:
        """Start the workers, show what they do, and return the state of every run at the end."""
        items = order(items)
        again = remade(items)
        todo = [item for item in items if not item.done or item.run.id in again]
        self._again = {item.run.id for item in todo if item.done}
        for item in todo:  # an earlier failure is tried again
            directory = RunDir(self.planner.root, item.run.id)
            if (directory.progress() or directory.failure()) and not directory.is_locked():
                with directory.lock() as mine:  # another sweep may have come to it just now
                    if mine:
                        note_end_of_earlier(directory)
                        directory.clear_state()
        gpus = visible_gpus()
        self._together = max((processes(item.run) for item in todo if item.run.kind == "train"), default=1)
        workers = self._config.workers or max(1, len(gpus) // self._together)
        waiting = self._jobs(todo, workers)
        slots = list(range(workers))
        active: list[Job] = []
        begun, ticks = time.monotonic(), 0
        self._states = self._observe(items, None)
        with self._display(begun) as show, stopping(active):
            while waiting or active or any(self._held(item) for item in todo):
                while job := _startable(waiting, active, free=bool(slots)):
                    waiting.remove(job)
                    job.slot = slots.pop(0) if job.device else None
                    self._start(job, gpus, workers)
                    active.append(job)
                time.sleep(TICK)
                for job in [job for job in active if job.process and job.process.poll() is not None]:
                    active.remove(job)
                    slots += [job.slot] if job.slot is not None else []
                    waiting = [*self._bury(job), *waiting]
                ticks += 1
                busy = {item.run.id for job in active for item in job.items} if ticks % FULL_LOOK else None
                self._states = self._observe(items, busy)
                show(self._states)
            self._changes.clear()
            self._states = self._observe(items, None)
            show(self._states)
        return self._states

    @property
    def _config(self) -> Local:
        assert isinstance(self.sweep.config.launcher, Local)
        return self.sweep.config.launcher

    def _held(self, item: Item) -> bool:
        """Whether a process works on the run: one of ours, or another sweep's, which is waited for."""
        return RunDir(self.planner.root, item.run.id).is_locked()

    def _observe(self, items: Sequence[Item], only: set[str] | None) -> list[State]:
        """The state of every run; looked at anew are those in `only` (None: all) that are not done yet and changed."""
        before = {state.run_id: state for state in self._states}
        states = []
        for item in items:
            known, again = before.get(item.run.id), item.run.id in self._again
            settled = known is not None and known.state == "done" and not again
            if known is not None and (settled or (only is not None and item.run.id not in only)):
                states.append(known)
                continue
            changed = _time_of_change(RunDir(self.planner.root, item.run.id))
            if known is None or known.state == "running" or changed != self._changes.get(item.run.id):
                self._changes[item.run.id] = changed
                known = observe(self.planner, self.planner.item(item.run) if again else item)
            states.append(known)
        return states

    def _jobs(self, items: Sequence[Item], workers: int) -> list[Job]:
        """Runs by base, parents with their children, cut so that every worker has something.

        Merges come after their inputs, in jobs of their own: their base is another one, and their inputs may be
        several workers'. So do judges, after the texts; those behind an API one after the other, for it has one limit.
        """
        making = tuple(stage for stage in self.stages if stage != "judge")
        makers = [i for i in items if i.to_make or i.missing or i.to_save or i.run.id in self._again] if making else []
        groups: dict[str, list[Item]] = {}
        for item in makers:
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
                jobs.append(Job(members, making, after=frozenset(inputs)))
        if "judge" in self.stages:
            made = {item.run.id for item in makers}
            groups_of_texts = [*(job.items for job in jobs), [item for item in items if item.run.id not in made]]
            jobs += [judging for members in groups_of_texts for judging in _judging(members, made)]
        return jobs

    def _start(self, job: Job, gpus: Sequence[str], workers: int) -> None:
        self._started += 1
        threads = self._config.threads or max(1, (os.cpu_count() or 1) // workers)
        path = self.folder / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._started:03d}.json"
        # an API needs no torch, in which the threads are set
        runs, told = [item.run for item in job.items], threads if job.device else None
        write_json(path, content(self.planner.root, self.folder, runs, job.stages, job.judges, told))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if gpus:
            first = (job.slot or 0) * self._together
            mine = [gpus[i % len(gpus)] for i in range(first, first + self._together)] if job.slot is not None else []
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
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
        """If a worker died in the middle, record it for the run it was at; the runs after it get a new worker.

        Raises:
            OSError: the worker could keep nothing, and neither could another one.
        """
        assert job.process is not None
        code = job.process.returncode
        if code in (0, SOME_FAILED):
            return []
        if code - DISK in DISK_FAULTS:
            raise OSError(code - DISK, os.strerror(code - DISK), str(self.planner.root))
        died = (
            f"the worker died: signal {signal.Signals(-code).name}"
            if code < 0
            else f"the worker died: exit code {code}"
        )
        directories = {item.run.id: RunDir(self.planner.root, item.run.id) for item in job.items}
        came = False
        for directory in directories.values():
            if directory.is_locked():  # another sweep's worker has taken it over, and says what became of it
                came = True
                continue
            progress = directory.progress()
            if progress is not None and progress.get("pid") == job.process.pid:
                with directory.lock() as mine:
                    if mine and directory.progress() == progress:
                        directory.fail(str(progress.get("stage")), died, _kind(code), log=str(directory.log))
                came = True
        left = [i for i in job.items if directories[i.run.id].failure() is None and self._has_work(job, i)]
        if came or len(left) < len(job.items):
            return [replace(job, items=left, process=None, slot=None, log=None)] if left else []
        for item in left:  # it never came to a run: another worker would not either
            with directories[item.run.id].lock() as mine:
                if mine:
                    directories[item.run.id].fail("start", died, _kind(code), log=str(job.log))
        return []

    def _has_work(self, job: Job, item: Item) -> bool:
        """Whether a job has something left to do of a run."""
        now = self.planner.item(item.run)
        if job.judges is not None:
            return any(judgement.option in job.judges for judgement in now.to_judge)
        return bool(now.to_make or now.missing or now.to_save)

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
            due = time.monotonic() - last[0] > PLAIN_INTERVAL
            for state in states:
                tag = f"{state.state} {state.detail}"
                if state.state == "waiting" or (
                    shown.get(state.run_id) == tag and not (due and state.state == "running")
                ):
                    continue
                if state.run_id in shown or state.state != "done":
                    say(f"[{counts['done']}/{len(states)}] {line(state)}", flush=True)
                shown[state.run_id] = tag
            if due:
                last[0] = time.monotonic()

        yield plain
        say(summary(Counter(state.state for state in self._states)), flush=True)


def _time_of_change(directory: RunDir) -> int:
    """When something was last put into a run's folder or taken away, as progress and records are; 0: there is none."""
    try:
        return directory.path.stat().st_mtime_ns
    except OSError:
        return 0


def _kind(code: int) -> str:
    """How the record of a run calls the death of its worker."""
    return "killed" if code == -signal.SIGKILL else "failed"


def _judging(items: Sequence[Item], made: Collection[str]) -> Iterator[Job]:
    """For each judge of these runs, the judging of what is not judged; of those that are `made` now, of everything."""
    judges: dict[tuple[str, bool], list[Item]] = {}
    for item in items:
        unjudged = {judgement.option for judgement, _ in item.unjudged}
        kinds = {option: judge.kind for scoring in item.run.scorings for _, option, judge in scoring.judges}
        for option, kind in sorted(kinds.items()):
            if option in unjudged or item.run.id in made:
                judges.setdefault((option, kind != "openai"), []).append(item)
    for (option, device), members in judges.items():
        after = frozenset(item.run.id for item in members)
        yield Job(members, ("judge",), (option,), after, device)


def _startable(waiting: Sequence[Job], active: Sequence[Job], *, free: bool) -> Job | None:
    """The first job that has what it needs: a free device or an API that no other asks, and its inputs made."""
    making = {item.run.id for job in (*waiting, *active) if job.stages != ("judge",) for item in job.items}
    asking = any(not job.device for job in active)
    able = (job for job in waiting if (free if job.device else not asking) and not job.after & making)
    return next(able, None)


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
        deadline = time.monotonic() + GRACE
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
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
