"""Which runs a worker trains together in one forward pass (`train.pack_runs`, training/pack_runs.py). No torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_align.grid.cost import module_shapes
from peft_align.grid.planner import Planner
from peft_align.grid.resources import allocation
from peft_align.grid.runs import Run
from peft_align.store.runs import RunDir


def companions(run: Run, others: Iterable[Run], planner: Planner) -> list[Run]:
    """The run and those of the others, in their order, that are trained together with it now; at least the run.

    Args:
        run: that is to be trained.
        others: that the worker has still to do.
        planner: says what of them is to be trained.
    """
    found, kind, most = [run], _kind(run), run.config.train.pack_runs
    if kind is None or not _is_ready(run, planner):
        return found
    for other in others:
        if len(found) == most:
            break
        fewer = min(most, other.config.train.pack_runs)
        if fewer > len(found) and _kind(other) == kind and _is_ready(other, planner):
            found.append(other)
            most = fewer
    return found


def _kind(run: Run) -> str | None:
    """Equal for runs whose tokens may lie in one row; None of a run that has to be alone."""
    peft, train = run.config.peft, run.config.train
    several = (allocation(run.config.resources, "train", run).gpus or 1) > 1
    hidden = peft.compute_dtype if peft.base_precision == "nf4" else peft.base_precision
    cast = peft.compute_dtype == "fp32" and peft.adapter_dtype != hidden  # by PEFT, around products of its own
    other = set(peft.target_modules) - module_shapes(run.config.model.shape).keys()  # embeddings, the head
    if run.kind != "train" or train.engine != "packed" or several or cast or other:
        return None
    base = (run.config.model, peft.base_precision, peft.double_quantization, peft.compute_dtype)
    return repr((*base, peft.adapter_dtype))


def _is_ready(run: Run, planner: Planner) -> bool:
    """Whether it is to be trained, can be, and was not too much for this machine the last time."""
    directory = RunDir(planner.root, run.id)
    last: dict[str, object] = next(reversed(directory.history()), {})
    if directory.is_locked() or last.get("kind") in ("killed", "out_of_memory"):
        return False
    made = all(RunDir(planner.root, parent).train_record() is not None for parent in run.parents)
    return made and planner.item(run).to_make is not None
