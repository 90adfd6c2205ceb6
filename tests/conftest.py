"""What the tests share: the real data, the models, and small runs on the tiny one."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

REPOSITORY = Path(__file__).parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests never reach for the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMOLLM2 = "smollm2-135m-instruct-dequantised-q4_1"


# Which files begin first, since they take long: a process that begins one at the end leaves the others idle.
FIRST = [REPOSITORY / "tests" / name for name in ("test_docs.py", "launch/test_local.py", "end_to_end", "training")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first; otherwise the order stays."""
    items.sort(
        key=lambda item: next((i for i, place in enumerate(FIRST) if item.path.is_relative_to(place)), len(FIRST))
    )


def pytest_collection_finish() -> None:
    """What tests have imported stays: collections of garbage, of which each training makes two, pass it over now.

    With the modules of torch, transformers and the tests, each takes half a second; that is most of a tiny training.
    """
    gc.collect()
    gc.freeze()


def missing(what: str) -> NoReturn:
    """Skip, or fail where everything must be there ($PEFT_ALIGN_REQUIRE_DATA)."""
    if os.environ.get("PEFT_ALIGN_REQUIRE_DATA"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data ($PEFT_ALIGN_SHARED, default ../shared); the test is skipped where there is none."""
    folder = Path(os.environ.get("PEFT_ALIGN_SHARED") or REPOSITORY.parent / "shared").resolve()
    if not (folder / "mirror").is_dir():
        missing(f"needs real data: {folder} is not there (set PEFT_ALIGN_SHARED)")
    return folder


@pytest.fixture(scope="session")
def mirror(shared: Path) -> Path:
    """The hub mirror in miniature."""
    return shared / "mirror"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The converted SmolLM2; the test is skipped where it was not made."""
    from peft_align.store.records import cache_dir

    folder = cache_dir() / "models" / SMOLLM2
    if not (folder / "complete.json").is_file():
        missing("needs the model: python scripts/fetch_smollm2.py")
    return folder


@pytest.fixture(scope="module")
def small_lm_eval() -> Iterator[None]:
    """lm-eval without what takes long: an index of its own thousands of tasks."""
    import torch
    from lm_eval.tasks import TaskManager

    from peft_align.evaluation import lm_eval_tasks

    managers: dict[str | None, TaskManager] = {}

    def task_manager(include_path: str | None) -> TaskManager:
        if include_path not in managers:
            folders = [str(lm_eval_tasks.OWN_TASKS), *([include_path] if include_path else [])]
            managers[include_path] = TaskManager(include_path=folders, include_defaults=False)
        return managers[include_path]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for the tiny model, more only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_tasks, "task_manager", task_manager)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Verbs that tests give in their own process share what was composed of the shipped options."""
    import programs

    from peft_align import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "ConfigSpace", programs.space)
        yield


Verb = Callable[..., "subprocess.CompletedProcess[str]"]


def checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check and done.returncode != 0:
        command = " ".join(map(str, done.args))
        pytest.fail(f"{command}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


@pytest.fixture
def verb(tmp_path: Path) -> Verb:
    """Run `python -m peft_align.VERB ...` in an empty folder."""
    import programs

    def run(*words: str, timeout: float = 600, check: bool = False) -> subprocess.CompletedProcess[str]:
        return checked(programs.program(words, tmp_path, timeout), check)

    return run


@pytest.fixture
def here(tmp_path: Path) -> Verb:
    """The same in this process, in a tenth of the time: for what starts no workers and is not killed."""
    import programs

    def run(*words: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        return checked(programs.in_this_process(words, tmp_path), check)

    return run
