"""Do everything that is missing of a sweep: train, evaluate each checkpoint, report. The same command finishes it.

usage: python -m peft_align.sweep [+grid=NAME] [key=value ...] [--config-dir DIR] [--cfg]

  A comma list or range() makes an axis; against a grid, it narrows or replaces the axis of that name.

examples:
  python -m peft_align.sweep +grid=quickstart
  python -m peft_align.sweep +grid=main model=mistral_7b method=dpo seed=0,1
  python -m peft_align.sweep dataset=hh_rlhf method=sft,dpo model=tiny peft.r=8,16 train.max_steps=4 hub.mirror=DIR

flags:
  --cfg             print the fully resolved config of the first run, and stop
  --config-dir DIR  take options from your own folder too (may be repeated)

exit code: 0 all done, 1 a run failed, 2 bad input (nothing was started), 130 interrupted
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from peft_align.cli import FAILED, ask, resolved, run_verb
from peft_align.config.benchmarks import PAIRED, RedInstruct
from peft_align.config.judges import ANSWERING, Classifier, Endpoint, LocalLM, Profanity
from peft_align.errors import Fault, InputError
from peft_align.grid.benchmarks import judge_prompt, no_prompt, red_instruct_files
from peft_align.grid.planner import Item
from peft_align.report import write_report
from peft_align.store.hub import is_here, model_folder
from peft_align.store.records import cache_dir
from peft_align.store.runs import RunDir
from peft_align.store.sweeps import write_manifest

STAGES = ("train", "merge", "evaluate", "judge")
LOG_TAIL = 15  # lines shown of a failed run's log


def verb(argv: list[str]) -> int:
    asked = ask(argv, ["--cfg"])
    if "--cfg" in asked.line.flags:
        print(resolved(asked.sweep), end="")
        return 0
    for run in asked.sweep.runs:  # what a killed process left complete is put in its place first
        directory = RunDir(asked.root, run.id)
        if (directory.attempt / "train.json").is_file():
            with directory.lock() as mine:
                if mine:
                    directory.commit_attempt()
    items = asked.plan()
    check_inputs([item for item in items if not item.done])
    write_manifest(asked.folder, asked.line.words, asked.line.config_dirs, [run.id for run in asked.sweep.runs])
    todo = sum(not item.done for item in items)
    print(f"{asked.sweep.name}: {len(items)} runs, {len(items) - todo} done, {todo} to do ({asked.folder})", flush=True)
    failed = []
    if todo:
        from peft_align.launch.local import LocalLauncher

        states = LocalLauncher(asked.sweep, asked.planner, asked.folder).run(items)
        failed = [state for state in states if state.state != "done"]
        items = asked.plan()
    for state in failed:
        print(f"\n{state.state.upper()} {state.run_id}\n  {state.detail}")
        print(tail(Path((RunDir(asked.root, state.run_id).failure() or {}).get("log", ""))))
    print()
    print(write_report(asked, items), end="")
    if failed:
        print(f"\n{len(failed)} of {len(items)} runs are not done; the same command tries them again.")
    return FAILED if failed else 0


def check_inputs(items: Sequence[Item], stages: Collection[str] = STAGES) -> None:
    """Before anything starts: what is needed is here, or on the hub if that may be asked. Raises InputError.

    Args:
        items: what is to be done.
        stages: of them.
    """
    faults = unready(items, stages)
    for (kind, repo), why in not_here(items, stages).items() if offline() else ():
        what = f"the {kind} {repo} is neither in the mirror nor in the hub's cache, and the hub is switched off"
        faults.append(Fault(why, what, "set hub.mirror=DIR to a folder that has it"))
    if faults:
        raise InputError(faults)


def unready(items: Sequence[Item], stages: Collection[str] = STAGES) -> list[Fault]:
    """What is missing on this machine that the hub does not provide: folders, packages, prompts, keys."""
    faults: list[Fault] = []
    for item in items:
        config = item.run.config
        mirror = config.hub.mirror
        if mirror is not None and not Path(mirror).expanduser().is_dir():
            faults.append(Fault(f"hub.mirror={mirror}", "is not a folder"))
            continue
        needs_base = set(stages) != {"judge"}
        if needs_base and config.model.source == "cache" and model_folder(config.model, mirror) is None:
            what = f"{config.model.hub_id} is not in the cache ({cache_dir() / 'models'})"
            hint = "make it once: python scripts/fetch_smollm2.py"
            faults.append(Fault(f"model={item.run.choices['model']}", what, hint))
        faults += _unready_benchmarks(item) if "evaluate" in stages else ()
        faults += _unready_judges(item) if "judge" in stages else ()
    return list(dict.fromkeys(faults))


def _unready_benchmarks(item: Item) -> Iterator[Fault]:
    for request, _ in item.missing:
        config = request.config
        if isinstance(config, RedInstruct):
            files = red_instruct_files(config, item.run.config.hub.mirror)
            if isinstance(files, Fault):
                yield files
        absent = [name for name in getattr(config, "packages", None) or () if find_spec(name) is None]
        if absent:
            needs = f"needs {', '.join(absent)}"
            yield Fault(f"benchmark {request.benchmark}", needs, f"pip install {' '.join(absent)}")


def _unready_judges(item: Item) -> Iterator[Fault]:
    for judgement, _ in item.unjudged:
        name, option, judge = judgement.request.benchmark, judgement.option, judgement.judge
        if judge.kind in ANSWERING and judge_prompt(judgement.request.config) is None:
            yield no_prompt(name, judgement.request.config)
        if isinstance(judge, Endpoint) and judge.api_key_env and not os.environ.get(judge.api_key_env):
            what = f"the environment variable {judge.api_key_env} is not set"
            yield Fault(f"judge={option}", what, "set it, or leave the judging for later: judge=none")
        if isinstance(judge, Profanity) and find_spec("profanity_check") is None:
            what = "the package alt-profanity-check is not installed"
            yield Fault(f"judge={option}", what, "pip install 'peft-align[profanity]'")


def not_here(items: Sequence[Item], stages: Collection[str] = STAGES) -> dict[tuple[str, str], str]:
    """What the hub must provide for what is to be done: (dataset or model, repository) -> which option needs it."""
    needed: dict[tuple[str, str, str | None, str | None], str] = {}
    for item in items:
        config, choices, mirror = item.run.config, item.run.choices, item.run.config.hub.mirror
        missing = item.missing if "evaluate" in stages else ()
        if config.model.source == "hub" and (item.to_make or item.to_save or missing):
            needed["model", str(config.model.hub_id), config.model.revision, mirror] = f"model={choices['model']}"
        used = [(config.dataset, choices["dataset"])] if item.run.kind == "train" and item.to_make else []
        for request, _ in missing:
            if request.config.kind in PAIRED:
                used.append((request.scoring.dataset, request.scoring.dataset_name))
            needed |= {
                ("dataset", repo, None, mirror): f"benchmark {request.benchmark}" for repo in request.config.data
            }
        for judgement, _ in item.unjudged if "judge" in stages else ():
            judge = judgement.judge
            if isinstance(judge, (Classifier, LocalLM)) and not Path(judge.hub_id).expanduser().is_dir():
                needed["model", judge.hub_id, judge.revision, mirror] = f"judge={judgement.option}"
        needed |= {("dataset", d.hub_id, d.revision, mirror): f"dataset={name}" for d, name in used if d.hub_id}
    return {
        (kind, repo): why
        for (kind, repo, revision, mirror), why in needed.items()
        if not is_here(repo, revision, kind, mirror)
    }


def offline() -> bool:
    """Whether the user forbade the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def tail(path: Path, lines: int = LOG_TAIL) -> str:
    """The end of a log, indented."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "  (no log)"
    shown = [line.rpartition("\r")[2] for line in text.splitlines()[-lines:]]
    return "\n".join([f"  the end of {path}:", *(f"  | {line}" for line in shown)])


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
