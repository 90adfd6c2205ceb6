"""A study by one sweep against the same study by scripts: for each run a TRL script, then lm_eval's command line.

    python benchmarks/sweep_vs_scripts.py
    python benchmarks/sweep_vs_scripts.py --ranks 8 --seeds 0 --steps 2 --limit 2

SFT and DPO at some ranks and seeds on HH-RLHF, each adapter and the base scored on five subjects of MMLU, 5-shot. Both
sides start from an empty folder, on the same rows (token ids, written to a file beforehand), in the same environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import ROOT, same_environment, write_down

from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.config.schema import DPO
from peft_align.grid.expand import build_sweep
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.store.runs import RunDir

SUBJECTS = ("anatomy", "astronomy", "econometrics", "human_aging", "marketing")
MIRRORED = """
import os, sys, datasets
original, mirror = datasets.load_dataset, sys.argv.pop(1)
def load_dataset(path, name=None, **kwargs):
    folder = os.path.join(mirror, path)
    return original(folder if os.path.isdir(folder) else path, name, **kwargs)
datasets.load_dataset = load_dataset
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""  # lm_eval's command line, told where the data is
Found = dict[str, dict[str, Any]]  # run -> losses, accuracies


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A study by one sweep against the same study by scripts.")
    parser.add_argument("--mirror", default=str(ROOT.parent / "shared" / "mirror"), help="hub mirror with the data")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=4, help="of the scripts")
    parser.add_argument("--limit", type=int, default=20, help="questions of a subject")
    parser.add_argument("--eval-batch", type=int, default=1, help="of lm_eval's command line: see mmlu_vs_lm_eval")
    return parser.parse_args()


def main() -> int:
    """Measure both sides, compare, print, write down."""
    given = arguments()
    same_environment()
    os.environ["HF_HUB_OFFLINE"] = "1"
    words = [
        "dataset=hh_rlhf", f"model={given.model}", "method=sft,dpo", "peft=lora", f"peft.compute_dtype={given.dtype}",
        f"peft.r={','.join(map(str, given.ranks))}", f"seed={','.join(map(str, given.seeds))}", "peft.dropout=0",
        "train.optimizer=adamw_torch", f"train.max_steps={given.steps}", f"train.batch_size={given.batch}",
        f"hub.mirror={given.mirror}", f"evaluation.limit={given.limit}", "launcher.workers=1",
        f"evaluation.benchmarks=[{','.join(f'mmlu_{subject}' for subject in SUBJECTS)}]",
        *(f"benchmark.mmlu_{subject}.num_fewshot=5" for subject in SUBJECTS),
    ]  # fmt: skip
    runs = build_sweep(ConfigSpace(), parse(words)).runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = [prepare(run, given, folder / "scripts" / run.id) for run in runs]
        started = time.perf_counter()
        command = [sys.executable, "-m", "peft_align.sweep", *words, f"root={folder / 'sweep'}"]
        subprocess.run(command, check=True)
        sweep_seconds = time.perf_counter() - started
        ours = by_sweep(runs, folder / "sweep")
        started = time.perf_counter()
        theirs = {run.id: by_script(job, given, len(ours)) for run, job in zip(runs, jobs, strict=True)}
        script_seconds = time.perf_counter() - started
    trained = [run.id for run in runs if run.kind == "train"]
    pairs = [(a, b) for run in trained for a, b in zip(ours[run]["losses"], theirs[run]["losses"], strict=True)]
    lines = [
        f"{len(trained)} runs of {given.steps} steps of {given.batch} pairs, and their base, {given.model}, "
        f"{given.dtype}, {len(SUBJECTS)} subjects of MMLU with {given.limit} questions each:",
        "",
        "| by | minutes | the sweep is faster by |",
        "| --- | --- | --- |",
        f"| one sweep | {sweep_seconds / 60:.1f} | |",
        f"| scripts | {script_seconds / 60:.1f} | {script_seconds / sweep_seconds:.2f} |",
        "",
        f"Losses of a step differ by at most {max(abs(a - b) for a, b in pairs):.1e}. Accuracy, sweep and scripts:",
        "",
        "| run | sweep | scripts |",
        "| --- | --- | --- |",
        *(f"| {run} | {mean(ours[run]):.3f} | {mean(theirs[run]):.3f} |" for run in ours),
    ]
    result = {"settings": vars(given), "seconds": {"sweep": sweep_seconds, "scripts": script_seconds}}
    name = f"sweep_vs_scripts_{given.model}_{given.dtype}"
    write_down(name, result | {"sweep": ours, "scripts": theirs}, "\n".join(lines))
    return 0


def prepare(run: Run, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the script of a run is told; its rows are written to a file."""
    from peft_align.models.loading import find_model, load_base
    from peft_align.training.run import training_rows

    folder.mkdir(parents=True)
    job: dict[str, Any] = {"folder": str(folder), "model": str(find_model(run.config.model, given.mirror)[0])}
    if run.kind != "train":
        return job
    rows, _ = training_rows(run.config, load_base(run.config))
    (folder / "rows.json").write_text(json.dumps([(row.prompt, row.chosen, row.rejected) for row in rows]))
    train, peft, method = run.config.train, run.config.peft, run.config.method
    job |= {"rows": str(folder / "rows.json"), "adapter": str(folder / "adapter"), "scratch": str(folder / "scratch")}
    job |= {"steps": given.steps, "batch": given.batch, "micro_batch": given.micro_batch, "dtype": given.dtype}
    job |= {"learning_rate": train.learning_rate, "weight_decay": train.weight_decay, "schedule": train.schedule}
    job |= {"max_grad_norm": train.max_grad_norm, "seed": run.config.seed, "method": method.kind}
    job |= {"r": peft.r, "alpha": peft.alpha, "target_modules": list(peft.target_modules)}
    job |= {"beta": method.beta} if isinstance(method, DPO) else {}
    (folder / "job.json").write_text(json.dumps(job))
    return job


def by_sweep(runs: list[Run], root: Path) -> Found:
    """What the sweep recorded."""
    found: Found = {}
    for run in runs:
        directory, accuracies = RunDir(root, run.id), {}
        for request in Planner(root, run.config.hub.mirror).item(run).requests:
            record = directory.evaluation_record(request.name)
            assert record is not None, f"{run.id} is not done"
            accuracies[request.benchmark] = next(m["value"] for m in record["metrics"] if m["name"] == "acc")
        losses = (directory.train_record() or {}).get("loss", [])
        found[run.id] = {"losses": losses, "accuracies": accuracies}
    return found


def by_script(job: dict[str, Any], given: argparse.Namespace, of: int) -> dict[str, Any]:
    """Train by the plain script if it is a training run, then score by lm_eval's command line."""
    folder, losses = Path(job["folder"]), []
    print(f"scripts: {folder.name}, of {of}", file=sys.stderr, flush=True)
    if "rows" in job:
        script = Path(__file__).parent / "plain_script.py"
        command = [sys.executable, str(script), str(folder / "job.json")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        losses = json.loads(done.stdout.splitlines()[-1])["losses"]
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[given.dtype]
    adapter = f",peft={job['adapter']}" if "rows" in job else ""
    command = [
        sys.executable, "-c", MIRRORED, given.mirror, "run", "--model", "hf",
        "--model_args", f"pretrained={job['model']},dtype={dtype}{adapter}",
        "--tasks", ",".join(f"mmlu_{subject}" for subject in SUBJECTS), "--num_fewshot", "5",
        "--limit", str(given.limit), "--batch_size", str(given.eval_batch), "--output_path", str(folder / "lm_eval"),
    ]  # fmt: skip
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    (path,) = (folder / "lm_eval").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    return {"losses": losses, "accuracies": {task: values["acc,none"] for task, values in results.items()}}


def mean(found: dict[str, Any]) -> float:
    """The mean accuracy over the subjects, which have as many questions each."""
    return statistics.fmean(found["accuracies"].values())


if __name__ == "__main__":
    raise SystemExit(main())
