"""Benchmarks by name: an option of conf/benchmark/, or any lm-eval task."""

from __future__ import annotations

import functools
import re
from importlib.util import find_spec
from pathlib import Path

from peft_align.config import validate
from peft_align.config.compose import ConfigSpace
from peft_align.config.schema import Benchmark
from peft_align.errors import Fault, suggest
from peft_align.store.records import Digests, digest_of, inventory

OWN_TASKS = Path(__file__).parents[1] / "evaluation" / "tasks"  # lm-eval tasks that the package carries


def find_benchmark(space: ConfigSpace, name: str, include_path: str | None, faults: list[Fault]) -> Benchmark | None:
    """The benchmark's settings; a name that is no option is looked for among lm-eval's tasks."""
    where = f"evaluation.benchmarks: {name}"
    if name in space.options("benchmark"):
        node = space.load("benchmark", name)
        found: Benchmark | None = validate.convert(Benchmark, node, f"benchmark/{name}.yaml", faults)
        if found is not None and found.kind == "lm_eval" and found.task is None:
            faults.append(Fault(f"benchmark/{name}.yaml", "task is missing", "name the lm-eval task"))
        return found
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        faults.append(Fault(f"evaluation.include_path={include_path}", "is not a folder"))
        return None
    if not lm_eval_has(name, include_path):
        known = space.options("benchmark")
        faults.append(Fault(where, "is neither an option of conf/benchmark/ nor an lm-eval task", suggest(name, known)))
        return None
    return Benchmark(kind="lm_eval", task=name, num_fewshot=None, metrics=["*"], data=[])


def task_folders(include_path: str | None) -> list[Path]:
    """Where lm-eval task files lie: the user's, the package's, lm-eval's."""
    spec = find_spec("lm_eval")
    builtin = [Path(p) / "tasks" for p in (spec.submodule_search_locations or [])] if spec else []
    return [*([Path(include_path).expanduser()] if include_path else []), OWN_TASKS, *builtin]


@functools.cache
def lm_eval_has(name: str, include_path: str | None) -> bool:
    """Whether a task, group or tag of this name is declared. Reads the YAML files as text: lm-eval imports slowly."""
    return any(_declares(folder, name) for folder in task_folders(include_path))


def _declares(folder: Path, name: str) -> bool:
    quoted = re.escape(name.encode())
    declared = re.compile(rb"^[\s\-\"']*(?:task|group|tag)[\"']?:\s*[\"']?" + quoted + rb"[\"']?\s*$", re.MULTILINE)
    listed = re.compile(
        rb"^(?:tag|group):[ \t]*\n(?:[ \t]*-[^\n]*\n)*?[ \t]*-[ \t]*[\"']?" + quoted + rb"[\"']?[ \t]*$",
        re.MULTILINE,
    )
    for path in folder.rglob("*.yaml"):
        text = path.read_bytes()
        if name.encode() in text and (declared.search(text) or listed.search(text)):
            return True
    return False


@functools.cache
def task_definition(name: str, include_path: str | None) -> str | None:
    """The digest of the folder that defines a task of the user's or the package's; lm-eval's go by its version."""
    for folder in task_folders(include_path)[: 2 if include_path else 1]:
        if _declares(folder, name):
            digests = Digests()
            files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
            return digest_of(inventory(folder, [path.relative_to(folder).as_posix() for path in files], digests))
    return None
