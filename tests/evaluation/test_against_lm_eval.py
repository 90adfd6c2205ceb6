"""The harness against lm_eval's own command line, sample by sample."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.evaluation.suite import Suite
from peft_align.grid.benchmarks import OWN_TASKS
from peft_align.grid.expand import build_sweep
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.launch.job import Worker
from peft_align.models.loading import Base, load_base
from peft_align.store.runs import RunDir
from peft_align.training.run import train

# The command line itself, told where the data is.
LM_EVAL = Path(__file__).parents[2] / "benchmarks" / "plain_study" / "lm_eval_offline.py"


def ours(run: Run, root: Path, base: Base) -> dict[tuple[str, int], dict[str, Any]]:
    """The samples of the run's lm-eval benchmark, by task and document."""
    directory, planner = RunDir(root, run.id), Planner(root, run.config.hub.mirror)
    if run.kind == "train" and planner.item(run).to_make:
        train(run, directory, base, lambda metrics, step: None)
    Suite().evaluate(run, directory, base, [request for request, _ in planner.item(run).missing])
    item = planner.item(run)
    assert item.done
    with gzip.open(directory.evaluation(item.requests[0].name) / "samples.jsonl.gz", "rt") as file:
        return {(s["task"], s["doc_id"]): s for s in map(json.loads, file)}


def theirs(
    base: Base,
    adapter: Path | None,
    task: str,
    limit: int,
    shots: int,
    mirror: Path,
    folder: Path,
    longest: int | None = None,
) -> dict[tuple[str, int], dict[str, Any]]:
    """The samples that `lm_eval run` logs."""
    peft = f",peft={adapter}" if adapter else ""
    command = [
        sys.executable, str(LM_EVAL), str(mirror), "run", "--model", "hf",
        "--model_args", f"pretrained={base.folder},dtype=float32{peft}", "--tasks", task, "--limit", str(limit),
        "--num_fewshot", str(shots), "--batch_size", "1", "--device", "cpu", "--log_samples",
        "--output_path", str(folder), "--include_path", str(OWN_TASKS),
        *(["--gen_kwargs", f"max_gen_toks={longest}"] if longest else []),
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        name = path.name.removeprefix("samples_").rpartition("_")[0]
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            found[name, sample["doc_id"]] = sample
    return found


def answers(sample: dict[str, Any]) -> list[float]:
    """The log-probability of each choice."""
    return [float(response[0]) for response in sample["filtered_resps"]]


def compare(mine: dict[tuple[str, int], dict[str, Any]], other: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert mine.keys() == other.keys()
    for key, sample in mine.items():
        assert answers(sample) == pytest.approx(answers(other[key]), rel=1e-4, abs=1e-4)
        assert sample["acc"] == other[key]["acc"]
        assert sample["prompt_hash"] == other[key]["prompt_hash"]


def compare_texts(mine: dict[tuple[str, int], dict[str, Any]], other: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert mine.keys() == other.keys()
    for key, sample in mine.items():
        assert sample["resps"] == other[key]["resps"], key
        assert sample["exact_match"] == other[key]["exact_match"]
        assert sample["prompt_hash"] == other[key]["prompt_hash"]


def recorded(root: Path, run: Run, benchmark: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The samples on disk of one benchmark of a run that is done."""
    item = Planner(root, run.config.hub.mirror).item(run)
    assert item.done, item.why
    (request,) = [request for request in item.requests if request.benchmark == benchmark]
    with gzip.open(RunDir(root, run.id).evaluation(request.name) / "samples.jsonl.gz", "rt") as file:
        return {(s["task"], s["doc_id"]): s for s in map(json.loads, file)}


def sweep_of(*words: str) -> list[Run]:
    return build_sweep(ConfigSpace(), parse(words)).runs


FP32 = (
    "peft=lora",
    "peft.compute_dtype=fp32",
    "evaluation.batch_size=4",
    "train.max_steps=2",
    "train.learning_rate=1e-2",
)


@pytest.mark.slow
def test_own_task_equals_the_command_line_for_an_adapter_and_the_base(tmp_path: Path) -> None:
    runs = sweep_of(
        "model=tiny", "dataset=everyday", "method=sft", *FP32, "train.batch_size=2", "train.max_length=300",
        "evaluation.benchmarks=[everyday_mc]", "evaluation.limit=6",
    )  # fmt: skip
    base = load_base(runs[0].config)
    for run in runs:
        adapter = RunDir(tmp_path, run.id).adapter if run.kind == "train" else None
        mine = ours(run, tmp_path, base)
        assert len(mine) == 6
        compare(mine, theirs(base, adapter, "everyday_mc", 6, 0, tmp_path, tmp_path / run.kind))


@pytest.mark.acceptance
def test_mmlu_of_smollm2_equals_the_command_line_for_an_adapter(mirror: Path, smollm2: Path, tmp_path: Path) -> None:
    """5-shot, 57 subjects, 2 questions each; an adapter trained on real rows, in fp32."""
    run = sweep_of(
        "model=smollm2_135m", "dataset=hh_rlhf", "method=sft", *FP32, "train.batch_size=4", f"hub.mirror={mirror}",
        "evaluation.benchmarks=[mmlu]", "evaluation.limit=2",
    )[0]  # fmt: skip
    base = load_base(run.config)
    mine = ours(run, tmp_path, base)
    assert len(mine) == 114
    item = Planner(tmp_path, str(mirror)).item(run)
    record = RunDir(tmp_path, run.id).evaluation_record(item.requests[0].name) or {}
    (metric,) = record["metrics"]
    assert (metric["name"], metric["n"], metric["higher_is_better"]) == ("acc", 114, True)
    compare(mine, theirs(base, RunDir(tmp_path, run.id).adapter, "mmlu", 2, 5, mirror, tmp_path / "lm_eval"))


@pytest.mark.acceptance
def test_mmlu_and_bbh_equal_the_command_line_for_the_base_and_two_adapters_of_one_process(
    mirror: Path, smollm2: Path, tmp_path: Path
) -> None:
    """MMLU with 2 questions a subject, BBH with 1 a task and 48 tokens, fp32; the base is loaded once for all three."""
    words = ("model=smollm2_135m", "dataset=hh_rlhf", "method=sft", *FP32, "train.batch_size=4", f"hub.mirror={mirror}")
    words += ("evaluation.max_new_tokens=48",)
    sweeps = [
        sweep_of(*words, "preference=harmless,helpful", f"evaluation.benchmarks=[{name}]", f"evaluation.limit={limit}")
        for name, limit in (("mmlu", 2), ("bbh", 1))
    ]
    for runs in zip(*sweeps, strict=True):  # one run with both benchmarks, each with its own limit
        runs[0].scorings += runs[1].scorings
    runs = sweeps[0]
    assert [run.kind for run in runs] == ["train", "train", "baseline"]
    worker = Worker(tmp_path, "test")
    assert worker.work(runs)
    assert worker._bases is not None
    assert worker._bases.loads == 1
    base = load_base(runs[0].config)
    for run in runs:
        adapter = RunDir(tmp_path, run.id).adapter if run.kind == "train" else None
        folder = tmp_path / "lm_eval" / run.id
        mmlu, bbh = recorded(tmp_path, run, "mmlu"), recorded(tmp_path, run, "bbh")
        assert (len(mmlu), len(bbh)) == (114, 27)
        compare(mmlu, theirs(base, adapter, "mmlu", 2, 5, mirror, folder / "mmlu"))
        compare_texts(bbh, theirs(base, adapter, "bbh", 1, 3, mirror, folder / "bbh", 48))
    first, second, baseline = (recorded(tmp_path, run, "mmlu") for run in runs)
    assert len({repr([answers(s) for s in each.values()]) for each in (first, second, baseline)}) == 3
