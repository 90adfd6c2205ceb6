"""lm-eval's tasks, loaded and with their requests built once for all runs of a process that are asked the same."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from peft_align.config.benchmarks import LmEval
from peft_align.grid.benchmarks import OWN_TASKS
from peft_align.grid.runs import Scoring
from peft_align.store.hub import mirrored, names_below
from peft_align.store.records import Digests, digest_of, inventory

# As lm_eval.simple_evaluate sets them where nothing is said (lm_eval/defaults.py, 0.4.13).
SEED_OF_PYTHON, SEED_OF_OTHERS = 0, 1234


@dataclass(frozen=True)
class Loaded:
    """Tasks with their data.

    Attributes:
        tasks: what lm_eval.evaluate takes; a task builds its requests when it is first evaluated.
        read: repository in the mirror -> the files that were read, and their digest.
    """

    tasks: dict[str, Any]
    read: dict[str, dict[str, Any]]


@dataclass
class Tasks:
    """Keeps what was loaded."""

    _known: dict[tuple[Any, ...], Loaded] = field(default_factory=dict)

    def get(self, benchmark: LmEval, scoring: Scoring, mirror: str | None) -> Loaded:
        """The tasks of a benchmark as they are asked.

        Args:
            benchmark: which task or group, with how many examples in the prompt.
            scoring: how many samples a task, how long texts, and where the user's tasks are.
            mirror: folder that is looked into before the hub.

        Raises:
            DatasetNotFoundError, ConnectionError, FileNotFoundError: of datasets, if the data cannot be read.
        """
        evaluation = scoring.evaluation
        longest, include_path = evaluation.max_new_tokens, evaluation.include_path
        key = (benchmark.task, benchmark.num_fewshot, evaluation.limit, longest, include_path, mirror)
        if key not in self._known:
            with mirrored_datasets(mirror) as read:
                manager = own_task_manager(include_path)
                if benchmark.task not in manager.all_subtasks:  # a group may name tasks of lm-eval's
                    manager = task_manager(include_path)
                tasks = manager.load([benchmark.task])
            for task in tasks["tasks"].values():
                _configure(task, benchmark.num_fewshot, longest)
                _build_once(task)
            self._known[key] = Loaded(tasks, read)
        return self._known[key]


@functools.cache
def task_manager(include_path: str | None) -> Any:
    """lm-eval's index of tasks, with the package's and the user's; several seconds, so made once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=_own_folders(include_path))


@functools.cache
def own_task_manager(include_path: str | None) -> Any:
    """The same of the package's and the user's tasks alone, which go before lm-eval's; made at once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=_own_folders(include_path), include_defaults=False)


def _own_folders(include_path: str | None) -> list[str]:
    return [str(OWN_TASKS), *([str(Path(include_path).expanduser())] if include_path else [])]


def set_seeds() -> None:
    """Seed as lm_eval.simple_evaluate does before it loads tasks."""
    random.seed(SEED_OF_PYTHON)
    np.random.seed(SEED_OF_OTHERS)
    torch.manual_seed(SEED_OF_OTHERS)


def _configure(task: Any, num_fewshot: int | None, longest: int | None) -> None:
    """Set what lm_eval.simple_evaluate sets of a task: a task that says 0 examples itself keeps them."""
    if longest is not None and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value={"max_gen_toks": longest}, update=True)
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=SEED_OF_OTHERS)


def _build_once(task: Any) -> None:
    """Have a task keep its requests from one evaluation to the next, without their answers.

    Building may draw random numbers, and so may scoring after it: it goes on with those that it would have had.
    """
    build = task.build_all_requests
    after: list[Any] = []  # the states of the random numbers when it was built

    @functools.wraps(build)
    def build_all_requests(**settings: Any) -> None:
        if not after:
            build(**settings)
            after.append((random.getstate(), np.random.get_state()))
            return
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
        of_python, of_numpy = after[0]
        random.setstate(of_python)
        np.random.set_state(of_numpy)

    task.build_all_requests = build_all_requests


@contextmanager
def mirrored_datasets(
    mirror: str | None, read: dict[str, dict[str, Any]] | None = None
) -> Iterator[dict[str, dict[str, Any]]]:
    """While it lasts, datasets.load_dataset finds repositories in the mirror; yields what was read from there.

    Args:
        mirror: folder that is looked into before the hub.
        read: what was read before; what is read now is added.

    lm-eval's tasks name their dataset in YAML and call load_dataset themselves; this is the one place to redirect.
    """
    read = {} if read is None else read
    original = datasets.load_dataset

    @functools.wraps(original)
    def load_dataset(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = mirrored(mirror, path, kwargs.get("revision"))
        if folder is None:
            return original(path, name, *args, **kwargs)
        kwargs.pop("revision", None)
        builder = datasets.load_dataset_builder(str(folder), name)
        paths = [p for split in (builder.config.data_files or {}).values() for p in split]
        names = names_below(folder, paths)
        loaded = original(str(folder), name, *args, **kwargs)
        known = read.setdefault(path, {"files": {}})["files"]
        known.update(inventory(folder, [n for n in names if n not in known], Digests()))
        return loaded

    datasets.load_dataset = load_dataset
    try:
        yield read
    finally:
        datasets.load_dataset = original
        for entry in read.values():
            entry["digest"] = digest_of(entry["files"])
