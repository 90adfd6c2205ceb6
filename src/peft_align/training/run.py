"""Trains one run from its config to its record, by the engine it asks for (training/packed.py, or TRL's own).

Supports: SFT and DPO; LoRA and QLoRA (NF4); CPU and CUDA devices (never run on CUDA so far); DPO from the base or
from an SFT run. The samples, their order and the batches are decided before the trainer sees them. Everything is
written into `attempt/` and put in place as a whole, its record last.

An interrupted run goes on from its last whole training state (training/state.py), to the same end.

Several processes may train a run together (launch/distributed.py): each calls `train` and takes an equal part of each
batch on its own device, the main one alone writes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, set_seed

from peft_align.config.schema import Config
from peft_align.data.encodings import Encodings, encoding_key
from peft_align.data.order import sample_order
from peft_align.data.sources import load_split
from peft_align.data.tokenization import TokenizedPair, check_scored, tokenize
from peft_align.grid.footprint import micro_batch
from peft_align.grid.planner import adapter_digest
from peft_align.grid.runs import Run
from peft_align.models.adapters import (
    adapter_weights,
    continue_adapter,
    new_adapter,
    restore_adapter,
    take_off,
    trainable_parameters,
)
from peft_align.models.loading import Base
from peft_align.models.packed_scoring import why_not_packed
from peft_align.models.provenance import peak_memory, provenance
from peft_align.store.records import link_tree, remove_tree, sha256, write_json
from peft_align.store.references import References
from peft_align.store.runs import FORMAT, RunDir, step_name
from peft_align.training import dpo, packed, processes, sft
from peft_align.training.engine import FORWARD, PackedTrainer
from peft_align.training.numerics import TrainingFailed, must_be_written
from peft_align.training.pack_runs import Member
from peft_align.training.recorder import Recorder, checkpoint_steps, memory_choice
from peft_align.training.state import METRICS, find_state
from peft_align.training.tracking import Log

METHODS = {
    ("trl", "sft"): sft.trainer,
    ("trl", "dpo"): dpo.trainer,
    ("packed", "sft"): packed.sft_trainer,
    ("packed", "dpo"): packed.dpo_trainer,
}


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
        TrainingFailed: a loss, a gradient or a weight is not finite, or what is made cannot be written.
    """
    config, started = run.config, time.monotonic()
    rows, data = training_rows(config, base, directory.root)
    if data["warning"]:
        processes.say(f"warning: {data['warning']}")
    for why, left_out in data["counts"]["dropped_rows"].items():
        processes.say(f"left out, {why}: row {', '.join(left_out)}")
    inputs = {
        "data": data["source"]["digest"],
        "model": base.source["digest"],
        "parents": {parent: adapter_digest(RunDir(directory.root, parent).train_record()) for parent in run.parents},
        "processes": processes.count(),  # each has random states of its own
    }
    steps = checkpoint_steps(run, directory)
    resumed = processes.agreed(find_state(directory, inputs, steps) if processes.is_main() else None)
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
            trainer.choose(resumed[1]["memory"] if resumed else {}, base.shared.attention.get("training"))
            if config.train.attention == "auto":
                base.shared.attention["training"] = trainer.attention
            values = References(directory.root, reference_key(config, inputs, trainer.attention))

            def tick(done: int) -> None:
                directory.report_progress(stage="reference", step=done, of=len(rows))
                if processes.count() == 1 and should_stop():  # several would have to agree, and are not at one place
                    raise Interrupted("the reference's values so far are kept")

            prepared = trainer.prepare(values, tick)
        if resumed:
            recorder.restore(resumed[1])
            processes.say(f"going on from step {resumed[1]['step']}")
        trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed else None)
        if recorder.interrupted:
            raise Interrupted(f"it was at step {recorder.step}; its last state is that of step {recorder.state}")
        seconds, joules = recorder.seconds, recorder.joules()
    finally:
        take_off(base, model)
    memory = processes.gathered(peak_memory())
    if not processes.is_main():
        return {}
    shutil.rmtree(directory.attempt / "scratch", ignore_errors=True)
    last, metrics = config.train.max_steps, directory.attempt / METRICS
    with must_be_written("the adapter"):
        remove_tree(directory.attempt / "adapter")  # a kill may have left one without a record
        link_tree(directory.attempt / "checkpoints" / step_name(last), directory.attempt / "adapter")
    record = {
        "format": FORMAT,
        "run": run.id,
        "stage": "train",
        "steps": last,
        "samples": last * config.train.batch_size,
        "checkpoints": recorder.saved,
        "metrics": {METRICS: {"size": metrics.stat().st_size, "sha256": sha256(metrics)}},
        "trainable_parameters": parameters,
        "parents": inputs["parents"],
        "inputs": {"data": data["source"], "model": base.source},
        "data": {key: data[key] for key in ("counts", "truncation", "warning")},
        "loss": recorder.losses,
        "seconds": {"total": round(time.monotonic() - started, 3), "training": round(seconds, 3)},
        "seconds_per_step": seconds / last,
        "tokens": recorder.tokens,
        "tokens_per_second": recorder.tokens / seconds,
        "peak_memory_bytes": max(memory, key=lambda used: used["gpu"] or used["resident"] or 0),
        "energy_joules": joules,
        "processes": processes.count(),
        "packed_with": recorder.packed_with,
        "engine": engine,
        "memory": memory_choice(trainer),
        "reference": prepared,
        "provenance": provenance(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    with must_be_written("the record"):
        write_json(directory.attempt / "train.json", record)
        directory.commit_attempt()
    return record


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
        InputError: the data cannot be read, or nothing of a sample's response is scored.
    """
    asked = repr((config.dataset, config.preference, config.hub.mirror))
    shared = base.shared
    if shared.split is None or shared.split[0] != asked:
        shared.split = asked, load_split(config.dataset, config.preference, "train", config.hub.mirror)
        shared.tokenized.clear()  # or a worker would keep the texts of all data that it ever saw
    split = shared.split[1]
    wanted = config.train.max_steps * config.train.batch_size
    order = sample_order(len(split.pairs), wanted, config.seed)
    used = sorted(set(order))
    pairs, template = [split.pairs[i] for i in used], config.model.template
    new = [pair for pair in pairs if (template, pair) not in shared.tokenized]
    kept = Encodings(root, encoding_key(split.source["digest"], template, base.tokenizer_digest)) if root else None
    there = kept.of(new) if kept and new else {}
    shared.tokenized |= {(template, pair): ids for pair, ids in there.items()}
    tokenized, truncation = tokenize(pairs, base.tokenizer, template, config.train.max_length, shared.tokenized)
    if kept and len(there) < len(new):
        kept.add({pair: shared.tokenized[template, pair] for pair in new if pair not in there})
    both = config.method.kind == "dpo"
    check_scored(tokenized, base.tokenizer, config.dataset.hub_id or config.dataset.loader, both=both)
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
