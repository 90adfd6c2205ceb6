"""A whole study by one sweep against a shell loop of plain TRL scripts and lm_eval's command line.

    python benchmarks/sweep_vs_scripts.py                                    # 12 runs: more than an hour on two cores
    python benchmarks/sweep_vs_scripts.py --ranks 8 --seeds 0 --dtype fp32   # 2 runs, whose numbers must be equal

Both sides start from nothing but the weights on disk and the rows, train the same runs on the same batches and score
them on the same questions. Wall time from the first command to the last result; the sweep also scores the base and
writes its report. The table goes into docs/performance.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from side_by_side import ROOT, in_turn, same_environment, write_down

PLAIN = Path(__file__).parent / "plain_study"
SUBJECTS = ("anatomy", "astronomy", "marketing", "philosophy", "virology")
METHODS = ("sft", "dpo")
Outcome = dict[str, Any]  # seconds, and by run: losses and accuracies


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", default=str(ROOT.parent / "shared" / "mirror"), help="hub mirror with the data")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="samples of an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=4, help="of the scripts")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), help="of MMLU")
    parser.add_argument("--limit", type=int, default=20, help="questions a subject")
    parser.add_argument("--lm-eval-batch", type=int, default=4, help="prompts of a forward pass of lm_eval")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    """Measure, compare, write down."""
    given = arguments()
    same_environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps(rows_of(given)), encoding="utf-8")

        def measure(side: str, at: int) -> Outcome:
            out = Path(folder) / f"{side}-{at}"
            out.mkdir()
            started = time.perf_counter()
            run_side(side, given, rows, out)
            seconds = time.perf_counter() - started
            return {"seconds": seconds, "runs": of_sweep(out) if side == "sweep" else of_scripts(out)}

        found = in_turn(["sweep", "scripts"], given.rounds, measure)
    lines = [*table(given, found), "", *differences(found)]
    name = "_".join(["sweep_vs_scripts", given.model, given.dtype])
    count = len(METHODS) * len(given.ranks) * len(given.seeds)
    write_down(name if count == 12 else f"{name}_{count}", {"settings": vars(given), "rounds": found}, "\n".join(lines))
    return 0


def words_of(given: argparse.Namespace) -> list[str]:
    """The command line of the sweep."""
    tasks = [f"mmlu_{subject}" for subject in given.subjects]
    return [
        f"model={given.model}", "dataset=hh_rlhf", "preference=harmless", f"method={','.join(METHODS)}", "peft=lora",
        f"peft.r={','.join(map(str, given.ranks))}", f"seed={','.join(map(str, given.seeds))}", "peft.dropout=0",
        f"peft.compute_dtype={given.dtype}", "train.optimizer=adamw_torch", f"train.max_steps={given.steps}",
        f"train.batch_size={given.batch}", f"evaluation.benchmarks=[{','.join(tasks)}]",
        f"evaluation.limit={given.limit}", *(f"benchmark.{task}.num_fewshot=5" for task in tasks),
        f"hub.mirror={given.mirror}",
    ]  # fmt: skip


def rows_of(given: argparse.Namespace) -> dict[str, Any]:
    """What the scripts are handed: token ids and hyperparameters, and where the weights are. Not timed."""
    from peft_align.config.command_line import parse
    from peft_align.config.compose import ConfigSpace
    from peft_align.config.schema import DPO
    from peft_align.grid.expand import build_sweep
    from peft_align.models.loading import load_base
    from peft_align.training.run import training_rows

    runs = [run for run in build_sweep(ConfigSpace(), parse(words_of(given))).runs if run.kind == "train"]
    base = load_base(runs[0].config)
    found: dict[str, Any] = {"model": str(base.folder), "dtype": given.dtype, "rows": {}, "steps": given.steps}
    found |= {"batch": given.batch, "micro_batch": given.micro_batch}
    for run in runs:
        config = run.config
        rows, _ = training_rows(config, base)
        found["rows"][str(config.seed)] = [[row.prompt, row.chosen, row.rejected] for row in rows]
        beta = {"beta": config.method.beta} if isinstance(config.method, DPO) else {}
        alpha = {"alpha": config.peft.alpha, "target_modules": list(config.peft.target_modules)}
        found[config.method.kind] = asdict(config.train) | alpha | beta
    return found


def run_side(side: str, given: argparse.Namespace, rows: Path, out: Path) -> None:
    """Do the whole study one way, into an empty folder; what it prints goes into a file beside."""
    if side == "sweep":
        command = [sys.executable, "-m", "peft_align.sweep", *words_of(given), f"root={out}"]
    else:
        tasks = ",".join(f"mmlu_{subject}" for subject in given.subjects)
        dtype = {"bf16": "bfloat16", "fp32": "float32"}[given.dtype]
        lists = [" ".join(map(str, values)) for values in (METHODS, given.ranks, given.seeds)]
        settings = [tasks, str(given.limit), dtype, str(given.lm_eval_batch)]
        command = [
            "bash",
            str(PLAIN / "study.sh"),
            sys.executable,
            given.mirror,
            str(rows),
            str(out),
            *lists,
            *settings,
        ]
    log = out.with_suffix(".log")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} ended with {done.returncode}:\n{log.read_text(errors='replace')[-3000:]}")


def of_sweep(root: Path) -> dict[str, Outcome]:
    """Losses and accuracies of each run, from its records and the table."""
    found: dict[str, Outcome] = {}
    names = {}
    for path in (root / "runs").glob("*/train.json"):
        config = json.loads((path.parent / "run.json").read_text())["config"]
        name = f"{config['method']['kind']}-r{config['peft']['r']}-s{config['seed']}"
        names[path.parent.name] = name
        found[name] = {"losses": json.loads(path.read_text())["loss"], "scores": {}}
    (results,) = (root / "sweeps").glob("*/results.csv")
    with results.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["run_id"] in names and row["metric"] == "acc":
                found[names[row["run_id"]]]["scores"][row["benchmark"]] = float(row["value"])
    return found


def of_scripts(out: Path) -> dict[str, Outcome]:
    """The same, from what the scripts and lm_eval wrote."""
    found: dict[str, Outcome] = {}
    for folder in (path for path in out.iterdir() if path.is_dir()):
        (results,) = folder.glob("lm_eval/**/results_*.json")
        scores = json.loads(results.read_text())["results"]
        accuracies = {task: float(values["acc,none"]) for task, values in scores.items()}
        found[folder.name] = {"losses": json.loads((folder / "losses.json").read_text()), "scores": accuracies}
    return found


def table(given: argparse.Namespace, found: dict[str, list[Outcome]]) -> list[str]:
    """Seconds of both sides and their ratio."""
    sweep, scripts = (statistics.median(each["seconds"] for each in found[side]) for side in ("sweep", "scripts"))
    count = len(METHODS) * len(given.ranks) * len(given.seeds)
    return [
        f"{count} runs: {' and '.join(METHODS)}, ranks {given.ranks}, seeds {given.seeds}, {given.steps} steps of "
        f"{given.batch}, HH-RLHF harmless, {given.model}, {given.dtype}; then MMLU, {len(given.subjects)} subjects, "
        f"{given.limit} questions each, 5-shot:",
        "",
        "| | minutes | the sweep is faster by |",
        "| --- | --- | --- |",
        f"| one sweep, its base and report included | {sweep / 60:.1f} | |",
        f"| a loop of TRL scripts (micro-batch {given.micro_batch}) and lm_eval | {scripts / 60:.1f} "
        f"| {scripts / sweep:.2f} |",
    ]


def differences(found: dict[str, list[Outcome]]) -> list[str]:
    """How far the numbers of both sides are apart."""
    pairs = [
        (ours["runs"][name], theirs["runs"][name])
        for ours, theirs in zip(found["sweep"], found["scripts"], strict=True)
        for name in ours["runs"] | theirs["runs"]
    ]
    losses = [abs(a - b) for our, their in pairs for a, b in zip(our["losses"], their["losses"], strict=True)]
    scores = [abs(our["scores"][task] - their["scores"][task]) for our, their in pairs for task in their["scores"]]
    equal = sum(apart < 1e-9 for apart in scores)
    told = f"{equal} of {len(scores)} accuracies are equal"
    if equal < len(scores):
        told += f", the others differ by at most {max(scores):.2f}"
    return [
        f"Losses of {len(losses)} steps differ by {statistics.fmean(losses):.1e} on average, at most {max(losses):.1e};"
        f" {told}."
    ]


if __name__ == "__main__":
    raise SystemExit(main())
