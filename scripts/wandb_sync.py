"""Upload runs that Weights & Biases kept offline, several at a time: those below a folder that are not uploaded yet.

    python scripts/wandb_sync.py outputs
    python scripts/wandb_sync.py outputs --dry-run
    python scripts/wandb_sync.py /scratch/me/outputs --jobs 8 --retries 5 --quiet 300

For machines whose compute nodes have no network: run it where there is one, with $WANDB_API_KEY or after `wandb login`.
Each run goes through wandb's own `wandb sync`; it counts as uploaded when wandb has marked it so. Left out are runs
that are uploaded, and those that are still written: a file changed in the last --quiet seconds, or its training is at
work. The same command goes on with the rest. Exit code: 0 if nothing is left but what is still written, 1 if something
could not be uploaded, 2 if the command line is wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from peft_align.store.leases import is_held
from peft_align.terminal import plain, say

OFFLINE, MARK = "offline-run-*", ".synced"
NO_LOGIN = "Not authenticated"  # `wandb sync` ends with 0 all the same
WAIT = 2.0  # seconds before the second try; twice as long before each further one


@dataclass(frozen=True)
class Found:
    """What lies below a folder.

    Attributes:
        runs: the folders that can be uploaded, by the run's id, oldest first: several may be parts of one run.
        synced: how many folders are uploaded already.
        written: folders that are still written, with the reason.
    """

    runs: dict[str, list[Path]]
    synced: int
    written: list[tuple[Path, str]]


def find(root: Path, quiet: float, now: float | None = None) -> Found:
    """Look for offline runs below a folder.

    Args:
        root: it; links are not followed.
        quiet: seconds for which nothing may have changed.
        now: seconds since the epoch, in place of the clock's.
    """
    runs: dict[str, list[Path]] = {}
    synced, written = 0, list[tuple[Path, str]]()
    for log in _logs(root):
        if log.with_name(f"{log.name}{MARK}").exists():
            synced += 1
        elif why := _still_written(log, quiet, time.time() if now is None else now):
            written.append((log.parent, why))
        else:
            runs.setdefault(log.stem.removeprefix("run-"), []).append(log.parent)
    # of one run, no part is uploaded before one that is older and not whole yet
    ids = {log.stem.removeprefix("run-") for folder, _ in written for log in folder.glob("*.wandb")}
    for run in ids & set(runs):
        written += [(folder, "another part of its run is still written") for folder in runs.pop(run)]
    return Found(runs, synced, written)


def _logs(root: Path) -> Iterator[Path]:
    """The log of each offline run, oldest first: a folder's name begins with the time."""
    found = []
    for place, folders, _ in os.walk(root):
        if Path(place).name == "wandb":
            found += [log for folder in Path(place).glob(OFFLINE) for log in folder.glob("*.wandb")]
            folders.clear()
    return iter(sorted(found, key=lambda log: log.parent.name))


def _still_written(log: Path, quiet: float, now: float) -> str | None:
    """Why a run is not to be uploaded yet."""
    age = now - max(path.stat().st_mtime for path in (log, log.parent))
    if age < quiet:
        return f"changed {max(0.0, age):.0f} s ago"
    run = log.parents[3]  # runs/<id>/tracking/wandb/offline-run-.../run-....wandb
    if log.parents[2].name == "tracking" and run.parent.name == "runs" and is_held(run, by_clock=True):
        return "its training is at work"
    return None


def wandb_command() -> list[str]:
    """wandb's program: the one on the path, else the module of this Python."""
    own = shutil.which("wandb")
    return [own] if own else [sys.executable, "-m", "wandb"]


def upload(folders: Sequence[Path], retries: int, timeout: float) -> str | None:
    """Upload the parts of one run, in one call so that they stay in order; returns what went wrong.

    Args:
        folders: the parts, oldest first.
        retries: further tries after the first.
        timeout: seconds of one try.
    """
    told = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))
        left = [folder for folder in folders if not _is_synced(folder)]
        if not left:
            return None
        try:
            done = subprocess.run(
                [*wandb_command(), "sync", *map(str, left)], capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            told = f"not done after {timeout:g} s"
            continue
        except OSError as error:
            return f"wandb cannot be started: {error}"
        if all(map(_is_synced, left)):
            return None
        lines = (done.stdout + done.stderr).strip().splitlines()
        told = lines[-1] if lines else f"exit code {done.returncode}, without a word"
        if any(NO_LOGIN in line for line in lines):
            return f"{NO_LOGIN}: set WANDB_API_KEY, or `wandb login`"
    return told


def _is_synced(folder: Path) -> bool:
    logs = list(folder.glob("*.wandb"))
    return bool(logs) and all(log.with_name(f"{log.name}{MARK}").exists() for log in logs)


def upload_all(runs: dict[str, list[Path]], jobs: int, retries: int, timeout: float) -> dict[str, str]:
    """Upload several runs at a time, saying how far it is; returns what went wrong, by run.

    Where nobody is logged in, nothing further is tried.
    """
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        under_way = {pool.submit(upload, folders, retries, timeout): run for run, folders in runs.items()}
        try:
            for i, future in enumerate(as_completed(under_way), start=1):
                run = under_way[future]
                if future.cancelled():
                    failed[run] = "not tried"
                    continue
                if told := future.result():
                    failed[run] = told
                say(f"[{i}/{len(runs)}] {run}: {told or 'uploaded'}", flush=True)
                if told and told.startswith(NO_LOGIN):
                    _cancel(under_way)
        except BaseException:
            _cancel(under_way)
            raise
    return failed


def _cancel(futures: Iterable[Future[str | None]]) -> None:
    for future in futures:
        future.cancel()


def main() -> int:
    """Find, upload, sum up. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the folder that is looked through, e.g. outputs")
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="runs at a time (default: 4)")
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="further tries of each (default: 2)")
    parser.add_argument("--quiet", type=float, default=60, metavar="S", help="seconds without a change (default: 60)")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds of one try (default: 600)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded, and upload nothing")
    asked = parser.parse_args()
    if not asked.root.is_dir():
        parser.error(f"{asked.root} is not a folder")
    if asked.jobs < 1 or asked.retries < 0 or asked.quiet < 0 or asked.timeout <= 0:
        parser.error("--jobs from 1, --retries and --quiet from 0, --timeout above 0")
    found = find(asked.root, asked.quiet)
    for folder, why in found.written:
        say(f"left out: {plain(str(folder))}: {why}")
    if asked.dry_run:
        for run, folders in found.runs.items():
            say(f"would upload {run}: {', '.join(map(str, folders))}")
        say(f"{len(found.runs)} runs would be uploaded, {found.synced} are, {len(found.written)} are still written")
        return 0
    try:
        failed = upload_all(found.runs, asked.jobs, asked.retries, asked.timeout)
    except KeyboardInterrupt:
        say("stopped; the same command goes on with the rest", file=sys.stderr)
        return 130
    done = len(found.runs) - len(failed)
    say(f"{done} runs uploaded, {len(failed)} failed, {found.synced} were before, {len(found.written)} still written")
    for run, told in failed.items():
        say(f"failed: {run}: {told}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
