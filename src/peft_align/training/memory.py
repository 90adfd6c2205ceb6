"""How many tokens a training step may hold at once, from a measurement: what is kept for backward, what is free.

The choice is rounded down to a power of two, so that two machines of one kind make the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

MEASURED = 512  # tokens that are measured, at least, where there are so many
MOST = {"cpu": 2048, "cuda": 16384}  # longer rows were not faster on a CPU; on a GPU they hide what a layer starts with
SHARE = {"cpu": 0.5, "cuda": 0.9}  # of what is free: a CPU's memory is everybody's
OPTIMIZER = 12  # bytes that a trained weight will need: its gradient and AdamW's two moments, in fp32
BEYOND = 1.25  # what forward and backward hold besides, on a CPU, for which there is no peak to be read


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of a GPU, or of the CPU, of which torch says so in words alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def kept_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that a forward and backward pass needs besides what is there before.

    Args:
        work: forward and backward.
        device: where. A GPU's own account is read; on a CPU, what autograd keeps is counted.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    living, most = 0, 0
    known: dict[int, int] = {}

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal living, most
            self.tensor, self.at = tensor, tensor.untyped_storage().data_ptr()
            if not known.get(self.at):
                living += tensor.untyped_storage().nbytes()
                most = max(most, living)
            known[self.at] = known.get(self.at, 0) + 1

        def __del__(self) -> None:
            nonlocal living
            known[self.at] -= 1
            if not known[self.at]:
                living -= self.tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        work()
    return int(most * BEYOND)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(int(psutil.virtual_memory().available), *_free_of_groups(Path("/sys/fs/cgroup")), 2**63)


def _free_of_groups(root: Path) -> Iterator[int]:
    """What Linux's control groups (version 2) leave this process, as Slurm and containers limit it."""
    try:
        (name,) = (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, ValueError):
        return
    group = root / name.strip().lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        try:
            limit, used = ((folder / f"memory.{what}").read_text().strip() for what in ("max", "current"))
        except OSError:
            continue
        if limit != "max":
            yield max(0, int(limit) - int(used))


def row_tokens(free: int, bytes_per_token: float, device: str) -> int:
    """Tokens of a row that fit, a power of two.

    Args:
        free: bytes.
        bytes_per_token: of a row, as measured.
        device: cpu or cuda.
    """
    fitting = max(1.0, free * SHARE[device] / bytes_per_token)
    return min(MOST[device], 1 << int(math.log2(fitting)))
