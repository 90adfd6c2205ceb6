"""What must be on this machine, or on the hub, before anything of a plan starts. No torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from peft_align.config.benchmarks import PAIRED, LmEval, RedInstruct
from peft_align.config.judges import ANSWERING, Classifier, Endpoint, LocalLM, Profanity
from peft_align.config.launchers import Slurm
from peft_align.errors import Fault, InputError
from peft_align.grid.benchmarks import prompt_fault, red_instruct_files
from peft_align.grid.planner import Item, Request
from peft_align.grid.resources import allocation
from peft_align.grid.runs import STAGES, Run
from peft_align.store.hub import is_here, mirrored, model_folder
from peft_align.store.records import cache_dir
from peft_align.store.runs import FILES, FOLDERS, RunDir
from peft_align.store.weights import model_faults


def check_inputs(items: Sequence[Item], stages: Collection[str] = STAGES) -> None:
    """Before anything starts: what is needed is here, or on the hub if that may be asked. Raises InputError.

    Args:
        items: what is to be done.
        stages: of them.
    """
    faults = [*_in_the_way(items), *unready(items, stages)]
    on_nodes = any(isinstance(i.run.config.launcher, Slurm) and i.run.config.launcher.offline for i in items)
    for (kind, repo), why in not_here(items, stages).items() if offline() or on_nodes else ():
        off = "jobs of a cluster do not ask the hub" if on_nodes else "the hub is switched off"
        what = f"the {kind} {repo} is neither in the mirror nor in the hub's cache, and {off}"
        faults.append(Fault(why, what, "fetch it: python -m peft_align.fetch with the same words and hub.mirror=DIR"))
    if faults:
        raise InputError(faults)


def _in_the_way(items: Sequence[Item]) -> list[Fault]:
    """Folders where the store writes files, and files where it makes folders: better told now than after a training."""
    places = {Path(item.run.config.root) / name: False for item in items for name in ("", "runs", "sweeps")}
    for item in items:
        folder = RunDir(Path(item.run.config.root), item.run.id).path
        if os.path.lexists(folder):
            places |= {folder: False, **{folder / name: name in FILES for name in (*FILES, *FOLDERS)}}
    faults = []
    for place, is_file in places.items():
        if is_file and place.is_dir():
            faults.append(Fault(str(place), "is a folder, and a file is to be written there", "move it away"))
        if not is_file and os.path.lexists(place) and not place.is_dir():
            faults.append(Fault(str(place), "is no folder, and one is to be made there", "move it away"))
    return faults


def unready(items: Sequence[Item], stages: Collection[str] = STAGES) -> list[Fault]:
    """What is missing on this machine that the hub does not provide: folders, packages, prompts, keys."""
    faults: list[Fault] = []
    known: dict[Path, list[Fault]] = {}  # of folders that were looked at
    for item in items:
        config = item.run.config
        mirror = config.hub.mirror
        if mirror is not None and not Path(mirror).expanduser().is_dir():
            hint = "python -m peft_align.fetch with the same words fills it"
            faults.append(Fault(f"hub.mirror={mirror}", "is not a folder", hint))
            continue
        needs_base = set(stages) != {"judge"}
        if needs_base and config.model.source == "cache" and model_folder(config.model, mirror) is None:
            what = f"{config.model.hub_id} is not in the cache ({cache_dir() / 'models'})"
            hint = "make it once: python scripts/fetch_smollm2.py"
            faults.append(Fault(f"model={item.run.choices['model']}", what, hint))
        if needs_base and config.model.source != "random" and (folder := model_folder(config.model, mirror)):
            faults += known.setdefault(folder, model_faults(folder) if folder not in known else [])
        if "train" in stages and item.to_make and item.run.kind == "train":
            try:
                processes(item.run)
            except InputError as error:
                faults += error.faults
        faults += _unready_benchmarks(item) if "evaluate" in stages else ()
        faults += _unready_judges(item) if "judge" in stages else ()
    return list(dict.fromkeys(faults))


def processes(run: Run) -> int:
    """How many processes train a run together: one a GPU. Raises InputError if they cannot share its batches evenly."""
    count, batch = allocation(run.config.resources, "train", run).gpus or 1, run.config.train.batch_size
    if batch % count:
        what = f"so many processes cannot share a batch of {batch} samples evenly"
        raise InputError([Fault(f"resources.gpus={count}", what, "take a divisor of train.batch_size")])
    return count


def _unready_benchmarks(item: Item) -> Iterator[Fault]:
    for request, _ in item.missing:
        config = request.config
        if isinstance(config, RedInstruct):
            files = red_instruct_files(config, item.run.config.hub.mirror)
            if isinstance(files, Fault):
                yield files
        if isinstance(config, LmEval) and request.scoring.evaluation.backend == "vllm":
            yield from _unready_vllm(item.run, request)
        absent = [name for name in getattr(config, "packages", None) or () if find_spec(name) is None]
        if absent:
            needs = f"needs {', '.join(absent)}"
            yield Fault(f"benchmark {request.benchmark}", needs, f"pip install {' '.join(absent)}")


def _unready_vllm(run: Run, request: Request) -> Iterator[Fault]:
    where = "evaluation.backend=vllm"
    if find_spec("vllm") is None:
        yield Fault(where, "the package vllm is not installed", "pip install vllm, on a machine with a GPU")
    if run.kind in ("merge", "external"):
        what = {"merge": "is a merge, and vLLM takes adapters", "external": "was not trained here, and may be no LoRA"}
        yield Fault(where, f"{run.id} {what[run.kind]}", "score it with evaluation.backend=hf")
    if request.scoring.base.base_precision == "nf4":
        hint = "evaluation.base_precision=bf16, or evaluation.backend=hf"
        yield Fault(where, f"{run.id} is scored on a base of 4 bits, which vLLM does not hold as it was trained", hint)


def _unready_judges(item: Item) -> Iterator[Fault]:
    for judgement, _ in item.unjudged:
        name, option, judge = judgement.request.benchmark, judgement.option, judgement.judge
        if judge.kind in ANSWERING and (fault := prompt_fault(name, judgement.request.config)):
            yield fault
        if isinstance(judge, Endpoint) and judge.api_key_env and not os.environ.get(judge.api_key_env):
            what = f"the environment variable {judge.api_key_env} is not set"
            yield Fault(f"judge={option}", what, "set it, or leave the judging for later: judge=none")
        if isinstance(judge, Profanity) and find_spec("profanity_check") is None:
            what = "the package alt-profanity-check is not installed"
            yield Fault(f"judge={option}", what, "pip install 'peft-align[profanity]'")
        if isinstance(judge, (Classifier, LocalLM)):
            own = Path(judge.hub_id).expanduser()
            folder = own if own.is_dir() else mirrored(item.run.config.hub.mirror, judge.hub_id, judge.revision)
            yield from model_faults(folder) if folder else ()


def not_here(items: Sequence[Item], stages: Collection[str] = STAGES) -> dict[tuple[str, str], str]:
    """What the hub must provide for what is to be done: (dataset or model, repository) -> which option needs it."""
    return {(kind, repo): why for (kind, repo, _), why in from_hub(items, stages).items()}


def from_hub(items: Sequence[Item], stages: Collection[str] = STAGES) -> dict[tuple[str, str, str | None], str]:
    """As `not_here`, with the revision."""
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
        (kind, repo, revision): why
        for (kind, repo, revision, mirror), why in needed.items()
        if not is_here(repo, revision, kind, mirror)
    }


def offline() -> bool:
    """Whether the user forbade the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
