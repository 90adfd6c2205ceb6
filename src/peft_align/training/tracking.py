"""Where the metrics of a run go besides its own files: nowhere, or to Weights & Biases."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from peft_align.config.schema import NoTracker, Wandb

WANDB_HOST = "api.wandb.ai"


class Log(Protocol):
    """Takes the metrics of one step."""

    def __call__(self, metrics: Mapping[str, float], step: int) -> None: ...


@contextmanager
def tracking(
    tracker: NoTracker | Wandb, *, group: str, name: str, axes: Mapping[str, Any], folder: Path
) -> Iterator[Log]:
    """Open the tracker for one run: group = sweep, name = run id, config = axes."""
    if isinstance(tracker, NoTracker):
        yield lambda metrics, step: None
        return
    import wandb

    mode = online_or_offline() if tracker.mode == "auto" else cast(Literal["online", "offline"], tracker.mode)
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=tracker.project,
        entity=tracker.entity,
        group=group,
        name=name,
        config=dict(axes),
        dir=str(folder),
        mode=mode,
        # no git: it would keep the address of the remote, which may hold a token; records have the commit
        settings=wandb.Settings(silent=True, console="off", reinit="create_new", disable_git=True, save_code=False),
    )
    try:
        yield lambda metrics, step: run.log(dict(metrics), step=step)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def online_or_offline() -> Literal["online", "offline"]:
    """online if there is an API key and the server answers, else offline."""
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").is_file()
    if not has_key:
        return "offline"
    try:
        with socket.create_connection((WANDB_HOST, 443), timeout=3):
            return "online"
    except OSError:
        return "offline"
