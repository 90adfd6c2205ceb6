"""Where a result comes from: code, versions, hardware, memory."""

from __future__ import annotations

import functools
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from peft_align import __version__
from peft_align.grid.planner import installed
from peft_align.store.code import code_digest

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "lm_eval", "hydra-core")


@functools.cache
def provenance() -> dict[str, Any]:
    """Git commit and dirtiness of the code, versions, hardware. Nothing of the environment's variables."""
    torch = sys.modules.get("torch")  # a judge behind an API does without it
    cuda = torch is not None and torch.cuda.is_available()
    return {
        "peft_align": __version__,
        "code": code_digest(),
        "git": git_state(Path(__file__).parents[1]),
        "python": sys.version.split()[0],
        "packages": {name: installed(name) for name in PACKAGES},
        "hardware": {
            "host": platform.node(),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads() if torch else None,
            "gpu": torch.cuda.get_device_name(0) if torch and cuda else None,
            "cuda": torch.version.cuda if torch and cuda else None,
        },
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None if the code is in no repository."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if (
        commit is None or git("ls-files", "--error-unmatch", "__init__.py") is None
    ):  # installed below someone's checkout
        return None
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def peak_memory() -> dict[str, int | None]:
    """Bytes: the largest resident size of this process so far, and what its GPU had allocated since the last reset."""
    import torch

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"resident": resident, "gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}
