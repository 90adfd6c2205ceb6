"""What energy this process's GPU has used, as its own counter says; nothing where nobody counts it.

Read through NVML (the package nvidia-ml-py, if it is installed). The counter is the whole GPU's: what other processes
do on it meanwhile is in it too. Never run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_align.models.loading import device


def joules() -> float | None:
    """Of the GPU since its driver was loaded; None without a GPU, without NVML, or if the GPU does not count."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        name = str(torch.cuda.get_device_properties(device()).uuid)  # CUDA's numbers of devices are not NVML's
        whole = name if name.startswith(("GPU-", "MIG-")) else f"GPU-{name}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(whole)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # it counts millijoules
    except (pynvml.NVMLError, AttributeError, TypeError, ValueError):
        return None


def used(before: float | None, begun: float | None, now: float | None) -> float | None:
    """Joules of a training that was gone on with; None if a part of it is not known, or the counter began anew.

    Args:
        before: of its earlier attempts.
        begun: the counter when this one began.
        now: the counter.
    """
    if before is None or begun is None or now is None or now < begun:
        return None
    return before + now - begun


def of_all(parts: Sequence[float | None]) -> float | None:
    """The sum over processes; None if one does not know its own."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
