"""The losses of a run against a plain TRL script on the same real rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import FP32, run_of, trained

from peft_align.config.schema import DPO
from peft_align.grid.runs import Run
from peft_align.models.loading import Base, load_base
from peft_align.training.run import training_rows

SCRIPT = Path(__file__).parent / "plain_trl.py"
BATCH = 4


def plain_trl(run: Run, base: Base, mirror: Path, folder: Path) -> list[float]:
    """The losses of the plain script with the run's rows, order and hyperparameters."""
    rows, _ = training_rows(run.config, base)
    method, peft, train = run.config.method, run.config.peft, run.config.train
    job: dict[str, Any] = {
        "model": str(base.folder),
        "data": str(mirror / "Anthropic/hh-rlhf/harmless-base/train.jsonl.gz"),
        "rows": [int(row.id.removeprefix("train:")) for row in rows],
        "template": run.config.model.template,
        "method": method.kind,
        "beta": method.beta if isinstance(method, DPO) else None,
        "steps": train.max_steps,
        "batch": BATCH,
        "micro_batch": train.micro_batch_size,
        "scratch": str(folder / "scratch"),
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "schedule": train.schedule,
        "seed": run.config.seed,
        "r": peft.r,
        "alpha": peft.alpha,
        "target_modules": peft.target_modules,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])["losses"]
    return losses


def compare(method: str, model: str, steps: int, mirror: Path, folder: Path) -> None:
    run = run_of(
        f"method={method}", f"model={model}", "dataset=hh_rlhf", "peft=lora", f"hub.mirror={mirror}", *FP32,
        f"train.max_steps={steps}", f"train.batch_size={BATCH}", "train.micro_batch_size=2", "train.max_length=4000",
        "train.learning_rate=1e-3", "seed=3",
    )  # fmt: skip
    base = load_base(run.config)
    ours = trained(run, folder / "outputs", base)["loss"]
    theirs = plain_trl(run, base, mirror, folder)
    assert len(ours) == steps
    assert len(set(ours)) > 1
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_losses_of_the_tiny_model_equal_plain_trl(method: str, mirror: Path, tmp_path: Path) -> None:
    compare(method, "tiny", 2, mirror, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_losses_of_smollm2_equal_plain_trl(method: str, mirror: Path, smollm2: Path, tmp_path: Path) -> None:
    compare(method, "smollm2_135m", 5, mirror, tmp_path)
