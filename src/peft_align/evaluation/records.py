"""How the results of benchmarks and judges are kept: samples first, the record last."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_align.evaluation.scores import Scores
from peft_align.grid.planner import Request
from peft_align.grid.runs import Run
from peft_align.models.provenance import provenance
from peft_align.store.records import atomic_write, forget_damage, sha256, verify, write_json
from peft_align.store.runs import FORMAT

AS_JSON_ESCAPE = "backslashreplace"  # half a surrogate pair, which is no character, becomes \udXXX
SAMPLES = "samples.jsonl.gz"


def record_of(run: Run, request: Request, seconds: float) -> dict[str, Any]:
    """What the records of an evaluation and of its judging both tell."""
    return {
        "format": FORMAT,
        "run": run.id,
        "step": request.step,
        "benchmark": request.benchmark,
        "base": run.base_of(request.scoring.base),
        "seconds": round(seconds, 3),
        "provenance": provenance(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def save(folder: Path, scores: Scores, content: Mapping[str, Any]) -> None:
    """Write the samples and other products, then the record, which names them with their digests."""
    with (
        atomic_write(folder / SAMPLES) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
    ):
        for sample in scores.samples:
            line = json.dumps(sample, ensure_ascii=False, default=str) + "\n"
            packed.write(line.encode(errors=AS_JSON_ESCAPE))
    for name, text in scores.files.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(text.encode(errors=AS_JSON_ESCAPE))
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in (SAMPLES, *scores.files)
    }
    found = {"metrics": [asdict(metric) for metric in scores.metrics], "details": scores.details, "files": files}
    write_json(folder / "record.json", {**content, **found})
    forget_damage(folder / "record.json")


def read_samples(folder: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The samples of a recorded evaluation. Raises Damaged if they are not what its record says."""
    verify(folder, record["files"])
    with gzip.open(folder / SAMPLES, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
