"""Data loaders for the tasks in this folder, named by ``!function`` in their YAML files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

FOLDER = Path(__file__).resolve().parent


def everyday_mc(**kwargs: Any) -> dict[str, datasets.Dataset]:
    """Load the questions that lie beside this file, so that the working directory does not matter.

    Args:
        **kwargs: The task's metadata, which lm-eval passes to every loader; none of it is needed here.

    Returns:
        The only split, ``test``.
    """
    lines = (FOLDER / "everyday_mc.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
