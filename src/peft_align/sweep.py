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

import sys
from pathlib import Path

from peft_align.cli import FAILED, ask, resolved, run_verb
from peft_align.grid.needs import check_inputs
from peft_align.report import write_report
from peft_align.store.runs import RunDir
from peft_align.store.sweeps import write_manifest

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
