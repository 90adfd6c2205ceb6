"""What a training leaves behind step by step: a line of metrics, the checkpoints asked for, states to go on from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from transformers import TrainerCallback

from peft_align.data.tokenization import TokenizedPair
from peft_align.grid.runs import Run
from peft_align.models.adapters import save_adapter
from peft_align.store.records import atomic_write, remove_tree
from peft_align.store.runs import RunDir, step_name
from peft_align.training import energy, processes
from peft_align.training.engine import PackedTrainer
from peft_align.training.numerics import check, largest, must_be_written
from peft_align.training.pack_runs import Member
from peft_align.training.state import METRICS, save_state
from peft_align.training.tracking import Log

TOLD = 0.5  # seconds between reports of progress


def checkpoint_steps(run: Run, directory: RunDir) -> set[int]:
    """The steps whose adapter is kept: those asked for, the last, and those that the run has.

    What another sweep asked for stays, or the two would undo each other's checkpoints for ever.
    """
    earlier = map(int, (directory.train_record() or {"checkpoints": {}})["checkpoints"])
    return {*run.steps, *earlier, run.config.train.max_steps}


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes a line of metrics a step, saves the checkpoints asked for, and says how far the run is.

    Of several processes, all have one: what they must agree about goes through it. Only the main one's writes.
    """

    def __init__(
        self,
        run: Run,
        directory: RunDir,
        model: Any,
        base_name: str,
        rows: list[TokenizedPair],
        log: Log,
        inputs: dict[str, Any],
        should_stop: Callable[[], bool],
        member: Member | None,
    ) -> None:
        self.inputs, self.should_stop, self.member = inputs, should_stop, member
        self.trainer: Any = None
        self.earlier: set[str] = set()  # companions of earlier attempts
        self.interrupted = False
        self.state: int | None = None  # the step of the last one
        self.step = self.first = 0  # steps made; those of earlier attempts
        self.before = 0.0  # seconds of training of earlier attempts
        self.joules_before: float | None = 0.0  # likewise; None: not known
        self.counter: float | None = None  # of the GPU's energy, when this attempt began
        self.run, self.directory, self.model, self.base_name, self.log = run, directory, model, base_name, log
        self.steps = checkpoint_steps(run, directory)
        self.saved: dict[str, dict[str, Any]] = {}
        self.losses: list[float] = []
        self.tokens = 0
        self.rows, both = rows, run.config.method.kind == "dpo"
        self.row_tokens = [
            len(row.prompt) + len(row.chosen) + (len(row.prompt) + len(row.rejected) if both else 0) for row in rows
        ]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.begun = self.started = self.told = 0.0

    def restore(self, record: Mapping[str, Any]) -> None:
        """Have what was recorded when the state was saved."""
        self.step = self.first = self.state = record["step"]
        self.saved, self.losses = dict(record["saved"]), list(record["losses"])
        self.tokens, self.before = record["tokens"], record["seconds"]
        self.joules_before = record.get("joules") if processes.is_main() else 0.0  # it is of all processes
        self.earlier = set(record.get("packed_with", ()))

    @property
    def packed_with(self) -> list[str]:
        """The runs that it made steps together with."""
        return sorted(self.earlier | (self.member.companions if self.member else set()))

    @property
    def seconds(self) -> float:
        """Of training, those of the attempts that it goes on from included; in a pack, its share."""
        return self.before + self._clock() - self.begun

    def joules(self) -> float | None:
        """Energy of training, of all processes and attempts; None where it is not counted, and in a pack, where nobody
        knows whose it was. All processes must come here."""
        now = None if self.member else energy.joules()
        return energy.of_all(processes.gathered(energy.used(self.joules_before, self.counter, now)))

    def _clock(self) -> float:
        return self.member.clock() if self.member else time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.started = self._clock(), time.monotonic()
        self.counter = energy.joules()
        self._tell(self.step, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps and processes.is_main():
            folder = self.directory.attempt / "checkpoints" / step_name(state.global_step)
            with must_be_written(f"the checkpoint of step {state.global_step}"):
                remove_tree(folder)
                self.saved[str(state.global_step)] = save_adapter(self.model, folder, self.base_name)

    def _save_state(self) -> None:
        more = {
            "saved": self.saved,
            "losses": self.losses,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "joules": self.joules(),
            "memory": memory_choice(self.trainer),
            "packed_with": self.packed_with,
        }
        keep = self.run.config.train.keep_states
        why = save_state(self.directory, self.trainer, self.step, self.inputs, more, keep)
        if why:  # training is worth more than a state of it
            processes.say(f"warning: the training state of step {self.step} cannot be written: {why}")
        else:
            self.state = self.step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        step, size = state.global_step, self.run.config.train.batch_size
        batch = range((step - 1) * size, step * size)
        rows = [self.rows[i] for i in batch]
        self.tokens += sum(self.row_tokens[i] for i in batch)
        line = {"samples": step * size, "tokens": self.tokens, **logs, "seconds": round(self.seconds, 3)}
        losses = [self.trainer.row_losses[i] for i in batch] if isinstance(self.trainer, PackedTrainer) else []
        if processes.is_main():
            of_rows = {"rows": [row.id for row in rows], "row_tokens": [self.row_tokens[i] for i in batch]}
            of_rows |= {"row_losses": losses} if losses else {}
            whole = json.dumps({"step": step, **line, **of_rows}) + "\n"
            with must_be_written(METRICS), (self.directory.attempt / METRICS).open("a", encoding="utf-8") as file:
                file.write(whole)
        loss = float(logs["loss"])
        values = {"loss": loss, "gradient norm": logs.get("grad_norm", 0.0), "largest weight": largest(self.trained)}
        check(step, values, rows, losses)
        self.losses.append(loss)
        self.log(line, step)
        self._tell(step, loss)
        self.step = step
        if step < self.run.config.train.max_steps:  # logs come each step, last of all that happens in it
            self.interrupted = processes.agreed(processes.is_main() and self.should_stop())
            if self.interrupted or step % self.run.config.train.state_every == 0:
                self._save_state()
            control.should_training_stop = control.should_training_stop or self.interrupted

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not processes.is_main():
            return
        path = self.directory.attempt / METRICS
        with must_be_written(METRICS), atomic_write(path) as temporary:  # synced to disk as a whole
            shutil.copyfile(path, temporary)

    def _tell(self, step: int, loss: float | None) -> None:
        """Progress for the live table, at most twice a second."""
        now = time.monotonic()
        if not processes.is_main() or (now - self.told < TOLD and 0 < step < self.run.config.train.max_steps):
            return
        self.told = now
        elapsed, made = now - self.started, step - self.first
        total = self.run.config.train.max_steps
        with suppress(OSError):  # what people look at is no reason to stop
            self.directory.report_progress(
                stage="train",
                step=step,
                of=total,
                loss=loss,
                seconds_per_step=elapsed / made if made else None,
                eta=elapsed / made * (total - step) if made else None,
            )


def memory_choice(trainer: Any) -> dict[str, Any]:
    """What the engine `packed` decided, for the record and for an interrupted run to go on with; else nothing."""
    if not isinstance(trainer, PackedTrainer):
        return {}
    return {
        "micro_batch_tokens": trainer.budget,
        "gradient_checkpointing": trainer.checkpointing,
        "attention": trainer.attention,
        "measured": trainer.measured,
    }
