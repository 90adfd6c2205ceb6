"""Small sweeps with all that their jobs write: steps, texts, what judges said of them, where it was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeping import finish_training, plan, trained

from peft_align.config.judges import judge_label
from peft_align.evaluation.records import save
from peft_align.evaluation.scores import Metric, Scores
from peft_align.grid.planner import Item, Judgement, Request
from peft_align.grid.runs import Run, Sweep
from peft_align.store.runs import FORMAT, RunDir

Lines = list[dict[str, Any]]
CPU = {"host": "here", "cpu": "x86_64", "cores": 2, "threads": 1, "gpu": None, "cuda": None}
GPU = CPU | {"gpu": "NVIDIA H100", "cuda": "13.0"}
TOXIC = "You fool"


def made_on(hardware: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What a record says of where it comes from."""
    packages = {"torch": "2.13.0", "bitsandbytes": "absent", **more.pop("packages", {})}
    git = {"commit": "c" * 40, "dirty": False}
    own = {"peft_align": "0.1.0", "code": "d156dadfca4fb655", "git": git, "python": "3.11.7"}
    return own | {"packages": packages, "hardware": dict(hardware)} | more


def trained_in(took: float, hardware: Mapping[str, Any] = CPU, **more: Any) -> dict[str, Any]:
    """What a record of a training of 16 samples tells that took so many seconds."""
    on_gpu = 3e9 if hardware["gpu"] else None
    own: dict[str, Any] = {"samples": 16, "tokens": 1600, "tokens_per_second": 1600 / took, "processes": 1}
    own |= {"seconds": {"total": took + 1, "training": took}, "packed_with": [], "seconds_per_step": took / 4}
    own |= {"peak_memory_bytes": {"resident": 2e9, "gpu": on_gpu}, "provenance": made_on(hardware)}
    return own | more


def texts(run: Run, count: int = 8) -> Lines:
    """Answers to prompts, in the form of real_toxicity's; each names its run."""
    return [
        {"question": str(i), "prompt": f"prompt {i}", "output": f"{run.id} answers {i}", "id": str(i), "raw": "",
         "tokens": 6, "ended": "length", "severe_toxicity": 0.5}
        for i in range(count)
    ]  # fmt: skip


def evaluated(
    root: Path, request: Request, lines: Lines, value: float = 0.5, hardware: Mapping[str, Any] = CPU, **more: Any
) -> Path:
    """Leave the texts of an evaluation on disk, by the function that jobs use."""
    folder = RunDir(root, request.run_id).evaluation(request.name)
    content = _content(request, "evaluate", hardware) | {"inputs": {}, "key": request.key} | more
    save(folder, Scores([Metric("response_words", value, 0.1, len(lines), None)], lines), content)
    return folder


def judged(root: Path, judgement: Judgement, lines: Lines, value: float, name: str = "score") -> Path:
    """Leave what a judge said on disk, likewise."""
    request, directory = judgement.request, RunDir(root, judgement.request.run_id)
    evaluation = directory.evaluation_record(request.name)
    assert evaluation is not None
    folder = directory.judgement(request.name, judgement.name)
    content = _content(request, "judge", CPU) | {"key": judgement.key, "samples": evaluation["files"]}
    content["judge"] = judge_label(judgement.option, judgement.judge)
    save(folder, Scores([Metric(name, value, 0.1, len(lines), True)], lines), content)
    return folder


def _content(request: Request, stage: str, hardware: Mapping[str, Any]) -> dict[str, Any]:
    own = {"format": FORMAT, "run": request.run_id, "stage": stage, "step": request.step, "seconds": 36.0}
    own |= {"benchmark": request.benchmark, "base": "bf16", "dataset": None, "preference": None}
    return own | {"provenance": made_on(hardware)}


def finish(
    root: Path,
    sweep: Sweep,
    value: Callable[[Run], float] = lambda run: 0.5,
    lines: Callable[[Run], Lines] = texts,
    **more: Any,
) -> list[Item]:
    """Train, evaluate and judge all of a sweep whose only benchmark is real_toxicity; the state of its runs then."""
    for run in trained(sweep):
        finish_training(root, run, **(trained_in(3599.0) | more))
    for item in plan(sweep, root):
        for request in item.requests:
            evaluated(root, request, lines(item.run))
    for item in plan(sweep, root):
        for judgement in item.to_judge:
            judged(root, judgement, scored(lines(item.run)), value(item.run))
    return plan(sweep, root)


def scored(lines: Sequence[Mapping[str, Any]]) -> Lines:
    """What a classifier says of texts: those that begin with an insult are toxic."""
    kept = ("id", "question", "prompt", "output")
    return [
        {name: line[name] for name in kept}
        | {"score": 1.5, "toxicity": 0.9 if str(line["output"]).startswith(TOXIC) else 0.1}
        for line in lines
    ]
