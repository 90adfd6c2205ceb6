"""What a worker runs: the stages of its runs, one run after the other, the base model loaded once.

    python -m peft_align.launch.job JOB.json           # the runs that the file holds
    python -m peft_align.launch.job ARRAY.json INDEX   # of a Slurm array: the runs of one line of its cell list

Every run is looked at again before it is touched, so a job can be started twice, and is never wrong to start.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_align.config.identity import Precision, evaluated_on, on_base
from peft_align.errors import InputError, WorkError
from peft_align.grid.needs import processes
from peft_align.grid.planner import Item, Judgement, Planner
from peft_align.grid.runs import STAGES, Run
from peft_align.grid.serialize import run_from_plain, write_identity
from peft_align.launch import queue
from peft_align.launch.job_file import of_array
from peft_align.launch.outcome import Blocked, details, kind_of, note_end_of_earlier, reason
from peft_align.launch.packs import companions
from peft_align.launch.process import Stopped, asked_to_stop, code_of_disk, die_with_parent, output_to
from peft_align.store.leases import Lost
from peft_align.store.records import Damaged, keep_others_from_writing, read_json, set_aside, verify, write_json
from peft_align.store.runs import RunDir, this_task
from peft_align.terminal import say, say_what_ends_us

if TYPE_CHECKING:
    from peft_align.evaluation.judging import Judging
    from peft_align.evaluation.suite import Suite
    from peft_align.models.loading import BaseCache
    from peft_align.training.pack_runs import Member

SOME_FAILED = 3  # not 1, with which Python ends on an error that nobody caught
WAIT = 1.0  # seconds between looks at runs that others hold


@dataclass
class Worker:
    """Does runs in this process; what they share is loaded once."""

    root: Path
    sweep: str
    stages: tuple[str, ...] = STAGES
    judges: tuple[str, ...] | None = None  # options that judge; None: all
    log: Path | None = None  # of this task, if it is one of Slurm's
    _bases: BaseCache | None = field(default=None)
    _suite: Suite | None = field(default=None)
    _judging: Judging | None = field(default=None)

    def work(self, runs: Sequence[Run], *, logged: bool = False) -> bool:
        """Do the runs in order; False if one failed. A run that another process holds is waited for, others go first.

        Args:
            runs: parents before children.
            logged: what a run prints goes to its own log.
        """
        everything, fine = self.stages, True
        for self.stages in _passes(everything, runs):
            fine = self._pass(runs, logged=logged) and fine
        self.stages = everything
        return fine

    def attempts(self, run_id: str) -> int:
        """How often a run stopped by itself without getting further."""
        return RunDir(self.root, run_id).attempts()

    def _pass(self, runs: Sequence[Run], *, logged: bool) -> bool:
        waiting, failed = list(runs), set[str]()
        while waiting:
            held = []
            for at, run in enumerate(waiting):
                if run.id in failed:
                    continue
                if self._must_wait(run):
                    held.append(run)
                    continue
                others = (r for r in islice(waiting, at + 1, None) if r.id not in failed)
                failed |= self._train_packed(run, others, logged=logged)
                if run.id in failed:
                    continue
                with self._output(run, logged=logged):
                    say(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {run.id}", flush=True)
                    done = self.do(run)
                if done is None:
                    held.append(run)
                failed |= {run.id} if done is False else set()
            waiting = held
            time.sleep(WAIT if waiting else 0)
        return not failed

    def _output(self, run: Run, *, logged: bool) -> AbstractContextManager[None]:
        return output_to(RunDir(self.root, run.id).log) if logged else nullcontext()

    def _train_packed(self, run: Run, others: Iterable[Run], *, logged: bool) -> set[str]:
        """Train a run together with some of the others, if it may be; returns the ids of those that failed."""
        if "train" not in self.stages or run.config.train.pack_runs == 1:
            return set()
        together = companions(run, others, Planner(self.root, run.config.hub.mirror))
        if len(together) == 1:
            return set()
        from peft_align.training.pack_runs import Pack

        pack, stages = Pack(), self.stages
        for each in together:
            output = partial(self._output, each, logged=logged)
            pack.add(each.id, partial(self._train_member, each), output)
        self.stages = ("train",)
        try:
            with asked_to_stop.after_the_step():
                done = pack.train()
        finally:
            self.stages = stages
        if asked_to_stop.by:  # before any of them made a step
            raise Stopped(128 + asked_to_stop.by)
        return {each.id for each, fine in zip(together, done, strict=True) if fine is False}

    def _train_member(self, run: Run, member: Member) -> bool | None:
        with_whom = ", ".join(other.run_id for other in member.group.members if other is not member)
        say(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {run.id}, together with {with_whom}", flush=True)
        return self.do(run, member)

    def _must_wait(self, run: Run) -> bool:
        """Whether another process is at the run, or at a parent that it needs."""
        if RunDir(self.root, run.id).is_locked():
            return True
        parents = [RunDir(self.root, parent) for parent in run.parents]
        return any(parent.train_record() is None and parent.is_locked() for parent in parents)

    def do(self, run: Run, member: Member | None = None) -> bool | None:
        """Do what is missing of one run: True if it is done, False if it failed, None if another process holds it.

        Args:
            run: to be done.
            member: of the pack that it is trained in.
        """
        directory = RunDir(self.root, run.id)
        with directory.lock() as mine:
            if not mine:
                return None
            stage, item = "start", None
            try:
                directory.commit_attempt()
                note_end_of_earlier(directory, self.log)
                planner = Planner(self.root, run.config.hub.mirror)
                item = planner.item(run)
                make = item.to_make if run.kind in self.stages else None
                forms = item.to_save if "merge" in self.stages else ()
                evaluates = "evaluate" in self.stages and bool(item.missing)
                if not (make or forms or evaluates or self._to_judge(item)):
                    if item.done:
                        directory.clear_state()  # what failed before was done since
                    return self._is_not_blocked(item, directory)
                if self.stages != ("judge",):  # what failed before is none of a judge's business
                    directory.clear_state()
                directory.remove_leftovers(is_trained=item.to_make is None)
                write_identity(run, directory)
                directory.report_progress(stage="load", step=0, of=0)
                if make or run.kind == "merge":
                    stage = run.kind
                    self._check_parents(run)
                if make:
                    self._make(run, directory, member)
                    item = planner.item(run)
                if "evaluate" in self.stages and item.to_make is None and item.missing:
                    stage = "evaluate"
                    self._evaluate(run, directory, item)
                for form in forms:
                    stage = f"save as {form}"
                    self._save(run, directory, form)
                if judgements := self._to_judge(planner.item(run)):
                    stage = "judge"
                    self._judge(run, directory, judgements)
            except Stopped as stop:
                directory.fail(stage, *stop.told)
                raise
            except Lost as lost:
                say(lost, flush=True)
                self._bases = None
                return None
            except Exception as error:  # one failed run never stops the others
                with suppress(OSError):  # on a full disk
                    if isinstance(error, (InputError, WorkError)):
                        say(f"failed: {stage}: {reason(error, directory.path)}", file=sys.stderr, flush=True)
                    else:
                        say(traceback.format_exc(), file=sys.stderr, flush=True)  # its message may be another machine's
                if not isinstance(error, Blocked):
                    self._bases = None  # it may not be as it was
                if isinstance(error, Damaged) and stage == "evaluate" and run.kind == "train":
                    directory.discard_record(str(error))
                if isinstance(error, Damaged) and stage == "judge" and item:
                    self._discard_damaged_texts(directory, item)
                told = reason(error, directory.path)
                directory.fail(stage, told, kind_of(error), log=str(directory.log), **details(error))
                return False
            finally:
                directory.end_progress()
            if planner.item(run).done:
                directory.clear_state()
            if directory.history():
                directory.remember({"kind": "done", "stage": stage, "time": time.time(), "task": this_task()})
            return True

    def _is_not_blocked(self, item: Item, directory: RunDir) -> bool:
        """True if nothing is left to do of a run; if nothing can be, for the stage before was not done, record that."""
        scores = "evaluate" in self.stages and bool(item.missing) and item.to_make is not None
        judges = "judge" in self.stages and bool(item.unjudged) and not item.to_judge
        if not (scores or judges) or (item.run.kind in self.stages):
            return True
        stage = "evaluate" if scores else "judge"
        why = f"blocked: {'its adapter is not made' if item.to_make else 'its texts are not generated'}"
        known = directory.failure()
        directory.fail(stage, why, "blocked")
        if known is not None:  # what it is blocked by says more
            write_json(directory.path / "failed.json", known)
        return False

    def _check_parents(self, run: Run) -> None:
        """Have the parents' products whole.

        Raises:
            Blocked: one was never finished.
            Damaged: one is not what its record says; it will be trained again next time.
        """
        for name in run.parents:
            parent = RunDir(self.root, name)
            if parent.train_record() is None:
                raise Blocked(f"blocked: its parent {name} is not done")
            with parent.lock() as mine:
                try:
                    parent.product()
                except Damaged as damage:
                    if mine:
                        parent.discard_record(str(damage))
                    raise

    def _make(self, run: Run, directory: RunDir, member: Member | None) -> None:
        if run.kind == "merge":
            from peft_align.models.merged import record_merge

            record_merge(run, directory)
            return
        from peft_align.launch.distributed import train_here, train_together
        from peft_align.training.run import Interrupted

        count = processes(run)
        if count > 1:
            self._bases = None  # the devices are theirs
        base = self._base(run) if count == 1 and member is None else None
        if member:
            base = member.base(lambda: self._base(run))
        try:
            with asked_to_stop.after_the_step():
                if base is None:
                    train_together(run, directory, self.sweep, count, lambda: bool(asked_to_stop.by))
                else:
                    train_here(run, directory, base, self.sweep, lambda: bool(asked_to_stop.by), member)
        except Interrupted as interrupted:
            raise Stopped(128 + asked_to_stop.by) from interrupted
        if asked_to_stop.by:  # in the last step: it is trained, and the time for the rest is not there
            raise Stopped(128 + asked_to_stop.by)

    def _save(self, run: Run, directory: RunDir, form: str) -> None:
        from peft_align.models.merged import save_merge

        directory.report_progress(stage=f"save as {form}")
        save_merge(run, directory, self._base(run), form)

    def _evaluate(self, run: Run, directory: RunDir, item: Any) -> None:
        from peft_align.evaluation.suite import Suite

        if self._suite is None:
            self._suite = Suite()
        missing = [request for request, _ in item.missing]
        for base in {request.scoring.base: None for request in missing}:  # usually one: that which it was made on
            wanted = [request for request in missing if request.scoring.base == base]
            self._suite.evaluate(run, directory, self._base(run, base), wanted)

    def _to_judge(self, item: Item) -> list[Judgement]:
        """What this worker can judge of a run now."""
        if "judge" not in self.stages:
            return []
        return [each for each in item.to_judge if self.judges is None or each.option in self.judges]

    def _judge(self, run: Run, directory: RunDir, judgements: list[Judgement]) -> None:
        from peft_align.evaluation.judging import Judging

        if self._judging is None:
            self._judging = Judging(self.root)
        self._judging.judge(run, directory, judgements)

    def _discard_damaged_texts(self, directory: RunDir, item: Item) -> None:
        """Have texts that are not what their record says generated again next time."""
        for request in {judgement.request.name: None for judgement in item.judgements}:
            record = directory.evaluation_record(request)
            try:
                verify(directory.evaluation(request), record["files"] if record else {})
            except Damaged as damage:
                set_aside(directory.evaluation(request) / "record.json", str(damage))

    def _base(self, run: Run, base: Precision | None = None) -> Any:
        from peft_align.models.loading import BaseCache

        if self._bases is None:
            self._bases = BaseCache()
        config = replace(run.config, peft=on_base(run.config.peft, base)) if base else run.config
        return self._bases.get(config, dequantized=run.kind == "merge")


def _passes(stages: tuple[str, ...], runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """All stages of each run in turn; or what makes runs first, where another base is evaluated than is trained on."""
    own = {(run.id, evaluated_on(run.config.peft, None)) for run in runs}
    if all((run.id, scoring.base) in own for run in runs for scoring in run.scorings):
        return [stages]
    making = tuple(stage for stage in stages if stage in ("train", "merge"))
    return [each for each in (making, tuple(stage for stage in stages if stage not in making)) if each]


def main(argv: list[str]) -> int:
    """Do the runs of a job file; the exit code is 0 if none failed, SOME_FAILED if each that did is recorded so."""
    in_array = len(argv) > 1
    if not in_array:
        die_with_parent()
    keep_others_from_writing()
    say_what_ends_us()
    signal.signal(signal.SIGTERM, asked_to_stop)
    signal.signal(signal.SIGUSR1, asked_to_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides
    job = read_json(Path(argv[0]))
    if job is None:
        say(f"{argv[0]} is not a job file", file=sys.stderr)
        return 2
    runs = job["runs"] if not in_array else of_array(Path(argv[0]).parent, job, argv[1])
    if job["threads"]:
        import torch

        torch.set_num_threads(job["threads"])
    judges = None if job["judges"] is None else tuple(job["judges"])
    log = Path(argv[0]).parent / "logs" / f"{Path(argv[0]).stem}-{argv[1]}.log" if in_array else None
    worker = Worker(Path(job["root"]), job["sweep"], tuple(job["stages"]), judges, log)
    try:
        return 0 if worker.work([run_from_plain(plain) for plain in runs], logged=True) else SOME_FAILED
    except OSError as error:
        return code_of_disk(error)
    except Stopped as stop:
        task = this_task()
        if task and stop.signal == signal.SIGUSR1:
            tired = [plain["id"] for plain in runs if worker.attempts(plain["id"]) >= job["attempts"]]
            if not tired:
                queue.requeue(task)
            else:
                say(f"not queued again: {', '.join(tired)} got no further in {job['attempts']} attempts", flush=True)
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
