"""A process that is given too little memory trains as one that has enough, with shorter rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOM = 600 * 2**20  # bytes: rows of the whole batch need about three times as much

SCRIPT = """
import json, resource, sys
from pathlib import Path
from helpers import FP32, run_of, trained
from peft_align.models.loading import load_base

folder, room = Path(sys.argv[1]), int(sys.argv[2])
run = run_of(
    "model=tiny", "model.shape.layers=6", "model.shape.hidden=256", "model.shape.ffn=688", "dataset=everyday",
    "method=dpo", "peft=lora", "train.engine=packed", "train.max_steps=2", "train.batch_size=16",
    "train.micro_batch_tokens=100000", "train.learning_rate=1e-3", *FP32,
)
base = load_base(run.config)
if room:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
record = trained(run, folder, base)
print(json.dumps({"loss": record["loss"], **record["memory"]}))
"""


def child(folder: Path, room: int) -> tuple[dict[str, Any], str]:
    """The record of a run in a process of its own, with so many bytes to grow by (0: as it likes), and its output."""
    command = [sys.executable, "-c", SCRIPT, str(folder), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_too_little_memory_makes_the_rows_shorter_and_no_other_trajectory(tmp_path: Path) -> None:
    free, _ = child(tmp_path / "free", 0)
    limited, said = child(tmp_path / "limited", ROOM)
    assert free["micro_batch_tokens"] == 100_000
    assert limited["micro_batch_tokens"] < 100_000
    assert f"out of memory: going on with {limited['micro_batch_tokens']} tokens at a time" in said
    assert limited["loss"] == pytest.approx(free["loss"], rel=1e-5)
