"""The quickstart on its real model."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLAIN = """
import sys
from peft import PeftModel; from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
print(sum(p.numel() for n, p in model.named_parameters() if "lora_" in n))
"""


def sweep(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "peft_align.sweep", "+grid=quickstart"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_quickstart_trains_scores_and_learns_and_is_done_the_second_time(smollm2: Path, tmp_path: Path) -> None:
    first = sweep(tmp_path)
    started = time.time()
    second = sweep(tmp_path)
    assert time.time() - started < 20
    assert "6 runs, 6 done, 0 to do" in second
    assert first[first.index("| method") :] == second[second.index("| method") :]
    (path,) = (tmp_path / "outputs/sweeps").glob("*/results.csv")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == "preference"]
    value = {(r["method"] or "baseline", r["peft"], r["metric"]): float(r["value"]) for r in rows}
    for method in ("sft", "dpo"):
        for peft, base in (("lora", "bf16"), ("qlora", "nf4")):
            assert value[method, peft, "response_loss"] < value["baseline", base, "response_loss"]
            assert value[method, peft, "reward_margin"] > 0
    adapters = sorted((tmp_path / "outputs/runs").glob("*/adapter"))
    assert len(adapters) == 4
    record = json.loads((adapters[0].parent / "train.json").read_text())
    loaded = subprocess.run(
        [sys.executable, "-c", PLAIN, str(smollm2), str(adapters[0])], capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert int(loaded.stdout) == record["trainable_parameters"]
