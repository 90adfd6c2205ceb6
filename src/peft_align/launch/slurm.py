"""Submits what is missing of a sweep to Slurm as job arrays; the engine is Slurm itself.

Scripts, cell lists and what was submitted lie in the sweep's folder (store/submissions.py). Nothing runs here: a task
is `python -m peft_align.launch.job ARRAY.json INDEX` with the code as it was at submission.
"""

from __future__ import annotations

import os
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peft_align.config.compose import config_dir
from peft_align.config.launchers import Allocation, Slurm
from peft_align.errors import Fault, InputError
from peft_align.grid.order import order
from peft_align.grid.planner import Item, Planner
from peft_align.grid.resources import allocation, directives
from peft_align.grid.runs import STAGES, Sweep
from peft_align.grid.serialize import run_to_plain
from peft_align.launch import queue
from peft_align.launch.arrays import Array, plan_arrays
from peft_align.launch.job_file import content
from peft_align.launch.local import CPU_MEMORY
from peft_align.store.code import code_digest, freeze
from peft_align.store.leases import hold
from peft_align.store.records import atomic_write, read_json, write_json
from peft_align.store.runs import RunDir
from peft_align.store.submissions import Submission, new_submission, submissions

DEFAULT_ARRAY = 1000  # where there is no cluster to ask (dry_run)


def templates() -> Path:
    """slurm/: in the wheel beside the package, in a checkout at the repository's root."""
    packaged = Path(__file__).parents[1] / "slurm"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "slurm"


@dataclass
class SlurmLauncher:
    """Writes the scripts of a sweep's missing work and submits them."""

    sweep: Sweep
    planner: Planner
    folder: Path
    words: Sequence[str] = ()  # of the command line, for the report
    config_dirs: Sequence[Path] = ()
    stages: tuple[str, ...] = STAGES

    @property
    def _config(self) -> Slurm:
        assert isinstance(self.sweep.config.launcher, Slurm)
        return self.sweep.config.launcher

    def submit(self, items: Sequence[Item]) -> Submission | None:
        """Submit what is missing and what no living job is going to do; None if there is no such.

        Raises:
            InputError: Slurm does not take a script; nothing was submitted then, or what was is cancelled.
        """
        dry = self._config.dry_run
        if not dry:
            queue.need_slurm()
        with hold(self.folder / "submitting") as mine:
            if mine is None:
                what = f"another process is submitting {self.folder.name} now"
                raise InputError([Fault("launcher=slurm", what, "see `python -m peft_align.status` when it is done")])
            return self._submit_missing(items, dry)

    def _submit_missing(self, items: Sequence[Item], dry: bool) -> Submission | None:
        for place in (
            self.folder.resolve(),
            Path.cwd(),
        ):  # scripts name them, and a line of theirs that breaks is another
            if not str(place).isprintable():
                what = "has a line break or another character in it that no script can hold"
                raise InputError([Fault(f"launcher=slurm: {place}", what, "use another folder")])
        try:
            largest = DEFAULT_ARRAY if dry and not queue.answers() else queue.largest_array()
            live = {} if dry else self._live()
        except queue.SlurmError as error:
            raise InputError([Fault("launcher=slurm", f"Slurm does not answer: {error}")]) from None
        resources = self.sweep.config.resources
        arrays = plan_arrays(order(items), resources, self._config, largest, live, self.stages)
        if not arrays:
            return None
        code = freeze(self.folder.resolve(), config_dir(), self.config_dirs)
        submission = new_submission(
            self.folder.resolve(),
            {
                "name": self.sweep.name,
                "words": list(self.words),
                "runs": [run.id for run in self.sweep.runs],
                "code": code_digest(),
                "folder": str(code),
            },
        )
        mine = self.sweep.by_id()
        self._write(submission, code, arrays, sorted({job for (run, _), job in live.items() if run in mine}))
        if not dry:
            self._submit(submission, arrays)
        return submission

    def _live(self) -> dict[tuple[str, str], str]:
        """(run, stage) -> the job of a task that is going to do it.

        What another sweep evaluates may be something else: only what it makes counts, and that with our checkpoints.
        """
        mine, wanted = self.folder.name, self.sweep.by_id()
        known = submissions(self.planner.root)
        adopt(known)
        names = {job: name for submission in known for job, name in submission.names.items()}
        living = queue.live_tasks(names, {submission.content["user"] for submission in known})
        found: dict[tuple[str, str], str] = {}
        for submission in known:
            own, told = submission.content["sweep"] == mine, None
            for task, array, runs in submission.tasks():
                if task not in living:
                    continue
                told = told or read_json(submission.folder / "runs.json") or {}
                for run in runs:
                    short = run in wanted and not set(wanted[run].steps) <= set(told.get(run, {}).get("steps", ()))
                    stages = [stage for stage in array["stages"] if stage in ("train", "merge") and not short]
                    if own:
                        stages = [*array["stages"], *(f"judge {option}" for option in array["judges"] or ())]
                    found |= {(run, stage): array["job"] for stage in stages}
        return found

    def _write(self, submission: Submission, code: Path, arrays: list[Array], others: Sequence[str]) -> None:
        """Everything that the jobs need, in the submission's folder."""
        place = submission.folder
        by_id = self.sweep.by_id()
        wanted = dict.fromkeys(run for array in arrays for task in array.tasks for run in task)
        write_json(place / "runs.json", {run: run_to_plain(by_id[run]) for run in wanted})
        for array in arrays:
            _write_text(place / f"{array.name}.cells", "".join(" ".join(task) + "\n" for task in array.tasks))
            launcher = self._config
            told = content(
                self.planner.root, self.folder, [], array.stages, array.judges, launcher.threads, launcher.attempts
            )
            told |= {"runs": "runs.json", "cells": f"{array.name}.cells"}
            write_json(place / f"{array.name}.json", told)
            program = ["-m", "peft_align.launch.job", str(place / f"{array.name}.json")]
            command = f'{shlex.join(program)} "$SLURM_ARRAY_TASK_ID"'
            title = f"{len(array.tasks)} tasks: {', '.join(array.stages)} of sweep {self.folder.name}"
            script = self._script(submission, array.name, array.asked, code, command, title, array)
            _write_text(place / f"{array.name}.sbatch", script)
        own = [
            f"--config-dir={folder}"
            for folder in sorted(code.glob("config-*"), key=lambda path: int(path.name.partition("-")[2]))
        ]
        report = shlex.join(["-m", "peft_align.report", "--ended", *self.words, *own])
        asked = allocation(self.sweep.config.resources, "report")
        title = f"the report of sweep {self.folder.name}"
        script = self._script(submission, "report", asked, code, report, title)
        _write_text(place / "report.sbatch", script)
        recorded = [
            {
                **{k: v for k, v in asdict(array).items() if k not in ("asked", "after_jobs")},
                "options": directives(array.asked),
            }
            for array in arrays
        ]
        submission.content |= {"arrays": recorded, "report": None, "others": list(others)}
        submission.content["dry_run"] = self._config.dry_run
        submission.save()

    def _script(
        self,
        submission: Submission,
        name: str,
        asked: Allocation,
        code: Path,
        command: str,
        title: str,
        array: Array | None = None,
    ) -> str:
        options = [f"--job-name={submission.job_name(name)}", f"--chdir={Path.cwd()}"]
        log = f"{name}-%a.log" if array else f"{name}.log"
        options += [f"--output={_percent(submission.folder / 'logs')}/{log}", "--open-mode=append"]
        if array:
            throttle = f"%{self._config.throttle}" if self._config.throttle else ""
            options += [f"--array=0-{len(array.tasks) - 1}{throttle}", "--requeue"]
            options += [f"--signal=B:USR1@{self._config.signal_before}"]
        options += directives(asked)
        threads = str(self._config.threads or '"${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"')
        setup = list(asked.setup or ())
        if not asked.gpus and (asked.gpus == 0 or not asked.gres):
            setup += [f"export {name}=${{{name}:-{value}}}" for name, value in CPU_MEMORY.items()]
        python = shlex.quote(os.path.expanduser(asked.python) if asked.python else sys.executable)
        template = string.Template((templates() / "launcher.sbatch").read_text(encoding="utf-8"))
        return template.substitute(
            title=title,
            cells=f"{name}.cells" if array else "this sweep",
            directives="\n".join(f"#SBATCH {_quoted(option)}" for option in options),
            setup="\n".join(setup),
            code=shlex.quote(str(code / "src")),
            threads=threads,
            offline="export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1" if self._config.offline else "",
            program=f"{asked.prefix + ' ' if asked.prefix else ''}{python} {command}",
        )

    def _submit(self, submission: Submission, arrays: list[Array]) -> None:
        """Have Slurm check every script, then submit them; all of them or none."""
        place = submission.folder
        names = [*(array.name for array in arrays), "report"]
        kinds: dict[str, str] = {}  # chunks of an array ask for the same
        for array in arrays:
            kinds.setdefault(repr((array.asked, array.stages)), array.name)
        faults = []
        for name in [*kinds.values(), "report"]:
            if wrong := queue.check_script(str(place / f"{name}.sbatch")):
                faults.append(Fault(f"{name}.sbatch", f"Slurm does not take it: {wrong}", "see resources"))
        if faults:
            submission.content["refused"] = [str(fault) for fault in faults]
            submission.save()
            raise InputError(faults)
        jobs: dict[str, str] = {}
        try:
            for array, recorded in zip(arrays, submission.content["arrays"], strict=True):
                after = [jobs[name] for name in array.after] + array.after_jobs
                array.job = recorded["job"] = jobs[array.name] = queue.submit(
                    str(place / f"{array.name}.sbatch"), after
                )
                submission.save()
            others = submission.content["others"]
            submission.content["report"] = queue.submit(str(place / "report.sbatch"), [*jobs.values(), *others])
            submission.save()
        except (queue.SlurmError, KeyboardInterrupt) as error:
            ids = jobs.values()
            told = f"Slurm did not take {names[len(jobs)]}.sbatch: {error}"
            submission.content["refused"] = [str(error) or "interrupted"]
            try:  # by their names too: one that did not answer in time may have been taken
                cancelled = {*ids, *queue.jobs_named({submission.job_name(name) for name in names}).values()}
                queue.cancel(sorted(cancelled))
                for recorded in submission.content["arrays"]:
                    recorded["job"] = None
                submission.content["report"] = None
                told += "; the jobs submitted before it are cancelled"
            except queue.SlurmError as again:
                told += f"; nor could those before it be cancelled ({again}): scancel {' '.join(ids)}"
            submission.save()
            if isinstance(error, KeyboardInterrupt):
                raise
            raise InputError([Fault("launcher=slurm", told)]) from None


def adopt(known: Sequence[Submission]) -> None:
    """Find the jobs of submissions that broke off before they could write down what Slurm had taken.

    Raises:
        SlurmError: Slurm does not answer.
    """
    for submission in known:
        content = submission.content
        open_ends = [array for array in content["arrays"] if not array["job"]]
        if not open_ends or content["dry_run"] or content.get("refused"):
            continue
        found = queue.jobs_named({submission.job_name(array["name"]) for array in open_ends})
        for array in open_ends:
            array["job"] = found.get(submission.job_name(array["name"]))
        content["refused"] = [array["name"] for array in open_ends if not array["job"]]  # never asked again
        submission.save()


def given_up(root: Path, items: Sequence[Item], attempts: int) -> dict[str, str]:
    """Runs that stopped by themselves too often without getting further, and why the last time."""
    found = {}
    for item in items:
        directory = RunDir(root, item.run.id)
        if not item.done and directory.attempts() >= attempts:
            last = directory.history()[-1]
            found[item.run.id] = f"{last['stage']}: {last['reason']}"
    return found


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _quoted(option: str) -> str:
    """An option as a line of a script holds it: a value with blanks in quotes."""
    flag, _, given = option.partition("=")
    if not any(c.isspace() or c in "#;'\"\\" for c in given):
        return option
    escaped = given.replace("\\", "\\\\").replace('"', '\\"')
    return f'{flag}="{escaped}"'


def _percent(path: Path) -> str:
    """A path in --output, where a percent sign begins a pattern."""
    return str(path).replace("%", "%%")


def summary(submission: Submission) -> str:
    """What was submitted, for people."""
    lines = []
    for array in submission.content["arrays"]:
        runs = sum(map(len, array["tasks"]))
        what = f"{len(array['tasks'])} tasks, {runs} runs: {', '.join(array['stages'])}"
        options = f" ({' '.join(array['options'])})" if array["options"] else ""
        lines.append(f"  {array['job'] or 'not submitted':>8}  {array['name']}  {what}{options}")
    report = submission.content["report"]
    lines.append(f"  {report or 'not submitted':>8}  report")
    return "\n".join(lines)
