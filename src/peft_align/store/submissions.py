"""What was given to Slurm for a sweep: sweeps/<sweep>/slurm/<time>/, one folder for each submission.

submission.json              arrays, their jobs, their runs; written before the first job is submitted and after each
runs.json                    what the runs are
<array>.sbatch, .json, .cells   the script, what its tasks are told, the runs of each task (one line a task)
logs/<array>-<task>.log      what a task printed outside of its runs' own logs
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_align.store.records import write_json
from peft_align.store.runs import FORMAT, damage, read_record
from peft_align.store.shapes import SUBMISSION


@dataclass
class Submission:
    """One folder of scripts and the jobs that they became."""

    folder: Path
    content: dict[str, Any]

    @property
    def jobs(self) -> list[str]:
        return [str(array["job"]) for array in self.content["arrays"] if array["job"]]

    @property
    def names(self) -> dict[str, str | None]:
        """The jobs that were submitted, that of the report among them, and what each is called."""
        jobs = {str(array["job"]): self.job_name(array["name"]) for array in self.content["arrays"] if array["job"]}
        report = self.content.get("report")
        return {**jobs, **({str(report): self.job_name("report")} if report else {})}

    def job_name(self, array: str) -> str:
        """What Slurm calls an array of this submission; no other job has the name."""
        return f"{self.content['sweep']}.{self.folder.name}.{array}"

    def tasks(self) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        """Each task of the arrays that were submitted: its id, its array, its runs."""
        for array in self.content["arrays"]:
            for index, runs in enumerate(array["tasks"]) if array["job"] else ():
                yield f"{array['job']}_{index}", array, runs

    def log(self, array: dict[str, Any], task: str) -> Path:
        return self.folder / "logs" / f"{array['name']}-{task.rpartition('_')[2]}.log"

    def save(self) -> None:
        write_json(self.folder / "submission.json", self.content)


def new_submission(folder: Path, content: dict[str, Any]) -> Submission:
    """A submission of a sweep, in a folder of its own; not saved yet."""
    stamp, n = time.strftime("%Y%m%d-%H%M%S"), 0
    while True:
        place = folder / "slurm" / (f"{stamp}-{n}" if n else stamp)
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            n += 1
            continue
        (place / "logs").mkdir()
        told = {"format": FORMAT, "time": time.time(), "sweep": folder.name, "user": getpass.getuser(), "arrays": []}
        return Submission(place, told | content)


def submissions(root: Path, sweep: str = "*") -> list[Submission]:
    """The submissions under a root, oldest first; those that cannot be read are left out."""
    found = []
    for path in sorted((root / "sweeps").glob(f"{sweep}/slurm/*/submission.json")):
        content = read_record(path, SUBMISSION)
        if content is not None:
            found.append(Submission(path.parent, content))
    return sorted(found, key=lambda each: each.content["time"])


def unreadable(root: Path) -> list[str]:
    """What is wrong with the submissions that are left out, a line each."""
    paths = sorted((root / "sweeps").glob("*/slurm/*/submission.json"))
    return [f"{path.parent}: {told}" for path in paths if (told := damage(path, SUBMISSION))]
