"""Trains one run from its config to its record, by the engine it asks for (training/packed.py, or TRL's own).

Supports: SFT and DPO; LoRA and QLoRA (NF4); CPU and CUDA devices (never run on CUDA so far); DPO from the base or
from an SFT run. The samples, their order and the batches are decided before the trainer sees them. Everything is
written into `attempt/` and put in place as a whole, its record last.

An interrupted run goes on from its last training state (training/state.py), to the same end.

Several processes may train a run together (launch/distributed.py): each calls `train` and takes an equal part of each
batch on its own device, the main one alone writes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from peft_align.config.schema import Config
from peft_align.data.encodings import Encodings, encoding_key
from peft_align.data.order import sample_order
from peft_align.data.sources import load_split
from peft_align.data.tokenization import TokenizedPair, tokenize
from peft_align.grid.footprint import micro_batch
from peft_align.grid.planner import adapter_digest
from peft_align.grid.runs import Run
from peft_align.models.adapters import (
    adapter_weights,
    continue_adapter,
    new_adapter,
    restore_adapter,
    save_adapter,
    take_off,
    trainable_parameters,
)
from peft_align.models.loading import Base
from peft_align.models.packed_scoring import why_not_packed
from peft_align.models.provenance import peak_memory, provenance
from peft_align.store.records import atomic_write, link_tree, write_json
from peft_align.store.references import References
from peft_align.store.runs import FORMAT, RunDir, step_name
from peft_align.training import dpo, packed, processes, sft
from peft_align.training.engine import FORWARD, PackedTrainer
from peft_align.training.pack_runs import Member
from peft_align.training.state import discard_state, find_state, save_state
from peft_align.training.tracking import Log

METHODS = {
    ("trl", "sft"): sft.trainer,
    ("trl", "dpo"): dpo.trainer,
    ("packed", "sft"): packed.sft_trainer,
    ("packed", "dpo"): packed.dpo_trainer,
}


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why."""


class Interrupted(Exception):
    """Training was asked to stop; its state is saved."""


def train(
    run: Run,
    directory: RunDir,
    base: Base,
    log: Log,
    should_stop: Callable[[], bool] = lambda: False,
    member: Member | None = None,
) -> dict[str, Any]:
    """Train a run, from its last state if there is one, and return its record, which is on disk then.

    Of several processes, only the main one returns a record, the others an empty one.

    Args:
        run: what to train.
        directory: where it goes; the caller holds its lock.
        base: the base model at the run's precision; given back as it was.
        log: called with the metrics of each step.
        should_stop: asked after each step, in the main process; if it says so, the state is saved and training ends.
        member: of the pack that it is trained in; None: it is trained alone.

    Raises:
        Interrupted: `should_stop` said so.
        InputError: the data cannot be read, or a target module does not exist.
        TrainingFailed: the loss is not finite.
    """
    config, started = run.config, time.time()
    rows, data = training_rows(config, base, directory.root)
    if data["warning"]:
        processes.say(f"warning: {data['warning']}")
    inputs = {
        "data": data["source"]["digest"],
        "model": base.source["digest"],
        "parents": {parent: adapter_digest(RunDir(directory.root, parent).train_record()) for parent in run.parents},
        "processes": processes.count(),  # each has random states of its own
    }
    resumed = processes.agreed(find_state(directory, inputs) if processes.is_main() else None)
    directory.attempt.mkdir(parents=True, exist_ok=True)
    prepared: dict[str, int] = {}
    engine = engine_of(config, base, rows)
    set_seed(config.seed)  # before the adapter is made: its A matrices are random
    parents = {parent: RunDir(directory.root, parent) for parent in run.parents}
    if parents:
        (parent,) = parents.values()
        model = continue_adapter(base, parent.adapter, config.peft)
    else:
        model = new_adapter(base, config.peft)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        weights = adapter_weights(model)
        recorder = Recorder(run, directory, model, base.source["name"], rows, log, inputs, should_stop, member)
        trainer = METHODS[engine, config.method.kind](
            model, base.tokenizer, rows, config, shared_arguments(config, directory.attempt / "scratch"), [recorder]
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.args.n_gpu > 1:
            raise TrainingFailed(f"{trainer.args.n_gpu} GPUs are visible to one run; set CUDA_VISIBLE_DEVICES to one")
        restore_adapter(model, weights, config.peft)
        if not processes.is_main():
            set_seed(config.seed + processes.rank())  # or each process would drop out the same of its samples
        processes.say(f"trainable parameters: {(parameters := trainable_parameters(model)):,}")
        recorder.trainer = trainer
        if isinstance(trainer, PackedTrainer):
            trainer.together = member.step if member else None
            trainer.choose(resumed[1]["memory"] if resumed else {})
            prepared = trainer.prepare(
                References(directory.root, reference_key(config, inputs, trainer.attention)),
                lambda done: directory.report_progress(stage="reference", step=done, of=len(rows)),
            )
        if resumed:
            recorder.restore(resumed[1])
            processes.say(f"going on from step {resumed[1]['step']}")
        trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed else None)
        if recorder.interrupted:
            raise Interrupted(f"its state at step {recorder.step} is saved")
        seconds = recorder.seconds
    finally:
        take_off(base, model)
    memory = processes.gathered(peak_memory())
    if not processes.is_main():
        return {}
    shutil.rmtree(directory.attempt / "scratch", ignore_errors=True)
    last = config.train.max_steps
    link_tree(directory.attempt / "checkpoints" / step_name(last), directory.attempt / "adapter")
    record = {
        "format": FORMAT,
        "run": run.id,
        "stage": "train",
        "steps": last,
        "samples": last * config.train.batch_size,
        "checkpoints": recorder.saved,
        "metrics": {"metrics.jsonl": {"size": (directory.attempt / "metrics.jsonl").stat().st_size}},
        "trainable_parameters": parameters,
        "parents": inputs["parents"],
        "inputs": {"data": data["source"], "model": base.source},
        "data": {key: data[key] for key in ("counts", "truncation", "warning")},
        "loss": recorder.losses,
        "seconds": {"total": round(time.time() - started, 3), "training": round(seconds, 3)},
        "seconds_per_step": seconds / last,
        "tokens": recorder.tokens,
        "tokens_per_second": recorder.tokens / seconds,
        "peak_memory_bytes": max(memory, key=lambda used: used["gpu"] or used["resident"] or 0),
        "processes": processes.count(),
        "packed_with": recorder.packed_with,
        "engine": engine,
        "memory": memory_choice(trainer),
        "reference": prepared,
        "provenance": provenance(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(directory.attempt / "train.json", record)
    directory.commit_attempt()
    discard_state(directory)
    return record


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


def engine_of(config: Config, base: Base, rows: list[TokenizedPair]) -> str:
    """The engine asked for; TRL's, with a warning, for a model that cannot be given rows."""
    longest = max((len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in rows), default=0)
    why = why_not_packed(base.model, longest) if config.train.engine == "packed" else None
    if why:
        processes.say(f"warning: {config.model.hub_id or 'this model'} is trained by TRL's own engine: {why}")
    return "trl" if why else config.train.engine


def reference_key(config: Config, inputs: Mapping[str, Any], attention: str) -> dict[str, Any]:
    """What the reference's log-probability of a sample depends on, besides the sample's tokens."""
    peft = config.peft
    return {
        "forward": FORWARD,
        "attention": attention,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "model": inputs["model"],
        "adapters": inputs["parents"],
        "base_precision": peft.base_precision,
        "double_quantization": peft.double_quantization,
        "compute_dtype": peft.compute_dtype,
        "adapter_dtype": peft.adapter_dtype if inputs["parents"] else None,
    }


def training_rows(config: Config, base: Base, root: Path | None = None) -> tuple[list[TokenizedPair], dict[str, Any]]:
    """The samples of all steps in their order, tokenized, and what the record says of them.

    Args:
        config: the run's.
        base: for its tokenizer, and for what was read and encoded before.
        root: of the results, where token ids are kept for other processes; None: they are not.

    Raises:
        InputError: the data cannot be read.
    """
    asked = repr((config.dataset, config.preference, config.hub.mirror))
    if base.split is None or base.split[0] != asked:
        base.split = asked, load_split(config.dataset, config.preference, "train", config.hub.mirror)
    split = base.split[1]
    wanted = config.train.max_steps * config.train.batch_size
    order = sample_order(len(split.pairs), wanted, config.seed)
    used = sorted(set(order))
    pairs, template = [split.pairs[i] for i in used], config.model.template
    new = [pair for pair in pairs if (template, pair) not in base.tokenized]
    kept = Encodings(root, encoding_key(split.source["digest"], template, base.tokenizer_digest)) if root else None
    there = kept.of(new) if kept and new else {}
    base.tokenized |= {(template, pair): ids for pair, ids in there.items()}
    tokenized, truncation = tokenize(pairs, base.tokenizer, template, config.train.max_length, base.tokenized)
    if kept and len(there) < len(new):
        kept.add({pair: base.tokenized[template, pair] for pair in new if pair not in there})
    by_index = dict(zip(used, tokenized, strict=True))
    return [by_index[i] for i in order], {
        "source": split.source,
        "counts": split.counts.plain() | {"for_training": len(split.pairs), "used": len(used)},
        "truncation": truncation,
        "warning": split.warning,
    }


def shared_arguments(config: Config, scratch: Path) -> dict[str, Any]:
    """What the trainers of all methods are told."""
    train = config.train
    share = train.batch_size // processes.count()  # accelerate deals the micro batches out in turn: a step has its rows
    micro = micro_batch(share, train.micro_batch_size)
    schedule = {"constant": "constant_with_warmup"}.get(train.schedule, train.schedule)
    return {
        "output_dir": str(scratch),
        "max_steps": train.max_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "train_sampling_strategy": "sequential",  # the rows come in their order
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "lr_scheduler_type": schedule,
        "warmup_steps": train.warmup_steps,
        "optim": train.optimizer,
        "adam_beta1": train.adam_betas[0],
        "adam_beta2": train.adam_betas[1],
        "seed": config.seed,
        "bf16": config.peft.compute_dtype == "bf16",
        "activation_checkpointing": bool(train.gradient_checkpointing),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # every weight of the adapter has its part in the loss
    }


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
        self.step = self.first = 0  # steps made; those of earlier attempts
        self.before = 0.0  # seconds of training of earlier attempts
        self.run, self.directory, self.model, self.base_name, self.log = run, directory, model, base_name, log
        # What another sweep asked for stays, or the two would undo each other's checkpoints for ever.
        earlier = map(int, (directory.train_record() or {"checkpoints": {}})["checkpoints"])
        self.steps = {*run.steps, *earlier, run.config.train.max_steps}
        self.saved: dict[str, dict[str, Any]] = {}
        self.losses: list[float] = []
        self.tokens = 0
        size, both = run.config.train.batch_size, run.config.method.kind == "dpo"
        lengths = [
            len(row.prompt) + len(row.chosen) + (len(row.prompt) + len(row.rejected) if both else 0) for row in rows
        ]
        self.step_tokens = [sum(lengths[i : i + size]) for i in range(0, len(lengths), size)]
        self.begun = self.started = self.told = 0.0

    def restore(self, record: Mapping[str, Any]) -> None:
        """Have what was recorded when the state was saved."""
        self.step = self.first = record["step"]
        self.saved, self.losses = dict(record["saved"]), list(record["losses"])
        self.tokens, self.before = record["tokens"], record["seconds"]
        self.earlier = set(record.get("packed_with", ()))

    @property
    def packed_with(self) -> list[str]:
        """The runs that it made steps together with."""
        return sorted(self.earlier | (self.member.companions if self.member else set()))

    @property
    def seconds(self) -> float:
        """Of training, those of the attempts that it goes on from included; in a pack, its share."""
        return self.before + self._clock() - self.begun

    def _clock(self) -> float:
        return self.member.clock() if self.member else time.time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.started = self._clock(), time.time()
        self._tell(self.step, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps and processes.is_main():
            folder = self.directory.attempt / "checkpoints" / step_name(state.global_step)
            shutil.rmtree(folder, ignore_errors=True)
            self.saved[str(state.global_step)] = save_adapter(self.model, folder, self.base_name)

    def _save_state(self) -> None:
        more = {
            "saved": self.saved,
            "losses": self.losses,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "memory": memory_choice(self.trainer),
            "packed_with": self.packed_with,
        }
        save_state(self.directory, self.trainer, self.step, self.inputs, more)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        step = state.global_step
        self.tokens += self.step_tokens[step - 1]
        line = {"step": step, "samples": step * self.run.config.train.batch_size, "tokens": self.tokens, **logs}
        line["seconds"] = round(self.seconds, 3)
        if processes.is_main():
            with (self.directory.attempt / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss is {loss} at step {step}")
        self.losses.append(loss)
        self.log({k: v for k, v in line.items() if k != "step"}, step)
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
        with atomic_write(self.directory.attempt / "metrics.jsonl") as temporary:  # synced to disk as a whole
            shutil.copyfile(self.directory.attempt / "metrics.jsonl", temporary)

    def _tell(self, step: int, loss: float | None) -> None:
        """Progress for the live table, at most twice a second."""
        now = time.time()
        if not processes.is_main() or (now - self.told < 0.5 and 0 < step < self.run.config.train.max_steps):
            return
        self.told = now
        elapsed, made = now - self.started, step - self.first
        total = self.run.config.train.max_steps
        self.directory.report_progress(
            stage="train",
            step=step,
            of=total,
            loss=loss,
            seconds_per_step=elapsed / made if made else None,
            eta=elapsed / made * (total - step) if made else None,
        )
