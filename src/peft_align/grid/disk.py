"""What a sweep will still write under its root, from models' shapes and from what like evaluations took. No torch.

Files take whole blocks of the file system. Where nothing like it was measured, the size of samples and caches is a rule
of thumb, stated below; adapters and saved merges are counted.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_align.config.benchmarks import Divergence, Generated, LmEval, RealToxicity
from peft_align.config.judges import ANSWERING
from peft_align.config.launchers import Local, Slurm
from peft_align.config.schema import DPO, Config, Disk
from peft_align.errors import Fault, InputError
from peft_align.grid.cost import BYTES, adapter_parameters, base_parameters, human_bytes, trainable_parameters
from peft_align.grid.footprint import moment_bytes, together
from peft_align.grid.planner import Item, Request
from peft_align.grid.runs import Run
from peft_align.store.runs import RunDir
from peft_align.store.usage import block_bytes, free_bytes, taken

RECORD = 4_000  # bytes of a record, of what a run is, of a log
METRICS_A_STEP = 300
TENSOR = 130  # of a file's header
RANDOM_STATES = 20_000  # and the schedule, beside the weights of a training state
STATES = 2  # kept of a run at a time: the next one is whole before the last one goes
# Rules of thumb, packed bytes of a sample.
SCORED, PAIR, ANSWERED, OF_TEXT = 250, 70, 1_500, 1.0  # of the last: for each token that may be generated
JUDGED, ANSWER = 250, 500  # what a judge said, and what is kept of it under judges/
ITEMS = {"mmlu": 14_042, "bbh": 6_511, "truthfulqa": 817, "gsm8k": 1_319, "hhh_alignment": 221, "ifeval": 541}
OTHER_ITEMS = 1_000
SUBTASKS = {"mmlu": 57, "bbh": 27}  # `evaluation.limit` holds for each of them
GENERATED = {"alpaca_eval": 805, "red_instruct": 200, "over_refusal": 450}
REFERENCE_VALUE, BUCKET, BUCKETS = 100, 600, 256  # store/references.py: of a sample, of a file, files
TOKEN, TOKENIZED_PAIR = 4, 32  # data/encodings.py
LIKE = 3  # evaluations of a kind that are looked at


@dataclass(frozen=True)
class Room:
    """Bytes that are still to be written.

    Attributes:
        adapters: of each checkpoint asked for, with records and metrics; adapter/ is linked where links work.
        states: training states while runs are trained; gone afterwards.
        samples: of evaluations and judgements, with their records.
        caches: reference/ and tokenized/, less what is there.
        merges: that are saved besides their recipe.
    """

    adapters: int = 0
    states: int = 0
    samples: int = 0
    caches: int = 0
    merges: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def room_needed(root: Path, items: Sequence[Item], devices: int = 1) -> Room:
    """What is still to be written of a plan.

    Args:
        root: of the results.
        items: of the plan.
        devices: of this machine, each with a worker where the launcher does not say how many there are.
    """
    block = block_bytes(root)
    training = [item for item in items if item.to_make and item.run.kind == "train"]
    runs = {item.run.id: item.run for item in items}
    copies = 0 if _links_work(root, items) else 1
    return Room(
        adapters=sum(_training_bytes(item.run, block, copies) for item in training),
        states=_state_bytes([item.run for item in training], devices),
        samples=_sample_bytes(root, items, block),
        caches=max(0, _cache_bytes([item.run for item in training], block) - _caches_there(root)) if training else 0,
        merges=sum(_merge_bytes(item, runs, block) for item in items if item.run.kind == "merge"),
    )


def described(root: Path, items: Sequence[Item], settings: Disk, devices: int = 1) -> dict[str, Any]:
    """The room that is needed, and the room that there is, for plan."""
    needed, free = room_needed(root, items, devices), free_bytes(root)
    kept = round(settings.keep_free_gb * 1e9)
    suffices = not needed.total or needed.total + kept <= free
    return {**asdict(needed), "total": needed.total, "free": free, "keep_free": kept, "suffices": suffices}


def check_room(root: Path, items: Sequence[Item], settings: Disk) -> None:
    """Before anything starts: what is sure to be written has room. Raises InputError."""
    if not settings.check:
        return
    needed = room_needed(root, items)
    sure, free, kept = needed.adapters + needed.merges, free_bytes(root), settings.keep_free_gb * 1e9
    if sure and sure + kept > free:
        what = f"adapters and merges take {human_bytes(sure)}, and {human_bytes(free)} are free"
        what += f", of which {human_bytes(kept)} are to stay so (disk.keep_free_gb)" if kept else ""
        hint = "see `python -m peft_align.clean`, take another root, or start all the same: disk.check=false"
        raise InputError([Fault(f"root={root}", what, hint)])


def _whole(size: float, block: int) -> int:
    """A file's size in whole blocks."""
    return math.ceil(size / block) * block


def _links_work(root: Path, items: Iterable[Item]) -> bool:
    """Whether adapter/ shares its files with the last checkpoint, as a run that is done shows; True without one."""
    for item in items:
        if item.run.kind == "train" and item.to_make is None:
            try:
                return any(path.stat().st_nlink > 1 for path in RunDir(root, item.run.id).adapter.iterdir())
            except OSError:
                continue
    return True


def _weights(run: Run, each: float) -> float:
    """A file of the adapter's size, with so many bytes for each of its parameters. Unknown modules count nothing."""
    tensors = 2 * run.config.model.shape.layers * len(set(run.config.peft.target_modules))
    return (adapter_parameters(run) or 0) * each + tensors * TENSOR


def _training_bytes(run: Run, block: int, copies: int) -> int:
    """A training's checkpoints and its own files; `copies`: of the last checkpoint, besides."""
    checkpoints = len({*run.steps, run.config.train.max_steps}) + copies
    one = _whole(_weights(run, BYTES[run.config.peft.adapter_dtype]), block) + _whole(RECORD, block) + block
    own = 3 * _whole(RECORD, block) + _whole(METRICS_A_STEP * run.config.train.max_steps, block)
    return checkpoints * one + own + (3 if copies else 4) * block  # folders: of the run, checkpoints/, adapter/, ...


def _state_bytes(runs: Sequence[Run], devices: int) -> int:
    """The states of the largest runs that are trained at a time."""
    if not runs:
        return 0
    launcher = runs[0].config.launcher
    workers = 1
    if isinstance(launcher, Local):
        workers = launcher.workers or devices
    elif isinstance(launcher, Slurm):
        workers = launcher.throttle or len(runs)
    at_once = workers * max(together(run.config) for run in runs)
    sizes = sorted((_state_of(run) for run in runs), reverse=True)
    return sum(sizes[:at_once])


def _state_of(run: Run) -> int:
    each = BYTES[run.config.peft.adapter_dtype] + moment_bytes(run.config)
    return round(STATES * (_weights(run, each) + RANDOM_STATES))


def _sample_bytes(root: Path, items: Sequence[Item], block: int) -> int:
    """Evaluations and judgements to be done: as large as the like of them, or by the rule."""
    found: dict[str, list[int]] = {}
    for item in items:
        missing = {id(request) for request, _ in item.missing}
        for request in item.requests:
            known = found.setdefault(_alike(request), [])
            if len(known) < LIKE and id(request) not in missing:
                folder = RunDir(root, item.run.id).evaluation(request.name)
                known.append(block + taken(*(path for path in folder.iterdir() if path.is_file())))
    total = 0
    for item in items:
        for request, _ in item.missing:
            measured = found[_alike(request)]
            ruled = block + _whole(_samples_of(request), block) + _whole(RECORD, block)
            total += round(statistics.median(measured)) if measured else ruled
        for judgement, _ in item.unjudged:
            texts = _count(judgement.request)
            total += 2 * block + _whole(texts * JUDGED, block) + _whole(RECORD, block)
            total += texts * ANSWER if judgement.judge.kind in ANSWERING else 0
        started = not item.requests or len(item.missing) < len(item.requests)
        total += 0 if started else block + (2 * _whole(RECORD, block) + block if item.run.kind == "baseline" else 0)
    return total


def _alike(request: Request) -> str:
    """Equal for evaluations whose samples are as many and as long, or nearly."""
    evaluation = request.scoring.evaluation
    return repr((request.benchmark, evaluation.limit, evaluation.heldout, evaluation.max_new_tokens))


def _samples_of(request: Request) -> float:
    """Bytes of the samples of an evaluation by the rule of thumb."""
    benchmark, longest = request.config, request.scoring.evaluation.max_new_tokens
    if isinstance(benchmark, (Generated, Divergence)):
        tokens = min(benchmark.max_new_tokens, longest or benchmark.max_new_tokens)
        return _count(request) * (SCORED + tokens * OF_TEXT)
    if isinstance(benchmark, LmEval):
        generates = benchmark.task.startswith(("bbh", "gsm8k", "ifeval", "humaneval"))
        return _count(request) * (ANSWERED if generates else SCORED)
    return _count(request) * PAIR


def _count(request: Request) -> int:
    """How many samples an evaluation has, as far as that is known without its data."""
    benchmark, evaluation = request.config, request.scoring.evaluation
    if isinstance(benchmark, Divergence):
        return min(benchmark.prompts, evaluation.heldout, evaluation.limit or benchmark.prompts)
    if isinstance(benchmark, LmEval):
        everything = ITEMS.get(benchmark.task, OTHER_ITEMS)
        limit = (evaluation.limit or everything) * SUBTASKS.get(benchmark.task, 1)
        return min(everything, limit)
    if isinstance(benchmark, Generated):
        everything = benchmark.prompts if isinstance(benchmark, RealToxicity) else GENERATED[benchmark.kind]
        return min(everything, evaluation.limit or everything) * benchmark.samples_per_prompt
    return evaluation.heldout


def _cache_bytes(runs: Sequence[Run], block: int) -> int:
    """Token ids, and reference values of DPO, of all samples that the runs train on, which many of them share."""
    tokenized: dict[str, dict[str, int]] = {}
    reference: dict[str, dict[str, int]] = {}
    length: dict[str, float] = {}
    for run in runs:
        config = run.config
        data = repr((config.dataset, config.preference))
        encoded = repr((config.dataset, config.model))
        _add(tokenized, encoded, f"{data} {config.seed}", config)
        length[encoded] = max(length.get(encoded, 0.0), config.train.max_length / 2)
        if isinstance(config.method, DPO) and config.train.engine == "packed":
            peft = config.peft
            base = (peft.base_precision, peft.double_quantization, peft.compute_dtype)
            _add(reference, repr((config.model, base, run.parents)), f"{data} {config.seed}", config)
    total = sum(_whole(sum(n.values()) * (TOKENIZED_PAIR + TOKEN * length[key]), block) for key, n in tokenized.items())
    return total + sum(_reference_bytes(sum(samples.values()), block) for samples in reference.values())


def _add(found: dict[str, dict[str, int]], key: str, order: str, config: Config) -> None:
    """Count the samples that a run draws; runs of one seed draw the same."""
    rows = (config.dataset.expected_rows or {}).get(config.preference.rule)
    drawn = min(config.train.max_steps * config.train.batch_size, rows or math.inf)
    known = found.setdefault(key, {})
    known[order] = max(known.get(order, 0), int(drawn))


def _reference_bytes(samples: int, block: int) -> int:
    used = BUCKETS * (1 - (1 - 1 / BUCKETS) ** samples)  # of the buckets, by chance
    return round(used * _whole(BUCKET + REFERENCE_VALUE * samples / used, block)) + block if samples else 0


def _caches_there(root: Path) -> int:
    return taken(root / "reference", root / "tokenized")


def _merge_bytes(item: Item, runs: Mapping[str, Run], block: int) -> int:
    """A merge's recipe, and the forms in which it is to be saved: an adapter has the ranks of its inputs together."""
    run, shape = item.run, item.run.config.model.shape
    total = 2 * _whole(RECORD, block) + block if item.to_make else 0
    for form in item.to_save:
        if form == "full":
            size: float = base_parameters(shape) * BYTES[run.config.peft.compute_dtype]
        else:
            inputs = [runs[parent].config.peft for parent in run.parents if parent in runs]
            names = sorted({name for peft in inputs for name in peft.target_modules})
            rank = getattr(run.config.merge, "save_rank", None) or sum(peft.r for peft in inputs)
            whole = dataclasses.replace(run.config.peft, r=rank, target_modules=names)
            size = (trainable_parameters(shape, whole) or 0) * BYTES["fp32"] + 2 * shape.layers * len(names) * TENSOR
        total += _whole(size, block) + 2 * block
    return total


def told(content: dict[str, Any]) -> Iterator[str]:
    """What `described` found, a line each for people: what is needed, and a warning where that has no room."""
    names = ("adapters", "states", "samples", "caches", "merges")
    parts = ", ".join(f"{human_bytes(content[name])} {name}" for name in names if content[name])
    free = f"{human_bytes(content['free'])} free"
    yield f"disk: {human_bytes(content['total'])} to be written ({parts}), {free}" if parts else f"disk: {free}"
    if not content["suffices"]:
        kept = f", of which {human_bytes(content['keep_free'])} are to stay so" if content["keep_free"] else ""
        yield f"warning: {human_bytes(content['total'])} may not fit into the {free}{kept} (disk.keep_free_gb)"
