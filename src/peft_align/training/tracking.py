"""Where the metrics of a run, and a sweep's report, go besides their own files: nowhere, or to Weights & Biases."""

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
    run = started(tracker, group=group, name=name, config=axes, folder=folder, job_type="train")
    try:
        yield lambda metrics, step: run.log(dict(metrics), step=step)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def started(
    tracker: Wandb,
    *,
    group: str,
    name: str,
    config: Mapping[str, Any],
    folder: Path,
    job_type: str,
    run_id: str | None = None,
) -> Any:
    """A run of wandb, to be finished by the caller.

    Args:
        tracker: where it goes.
        group: the sweep's folder.
        name: for people.
        config: what it is of.
        folder: where wandb keeps its files.
        job_type: "train" or "report".
        run_id: of a run that is gone on with where it is there; None: a new one.
    """
    import wandb

    mode = online_or_offline() if tracker.mode == "auto" else cast(Literal["online", "offline"], tracker.mode)
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=tracker.project,
        entity=tracker.entity,
        group=group,
        name=name,
        job_type=job_type,
        id=run_id,
        resume="allow" if run_id and mode == "online" else None,
        config=dict(config),
        dir=str(folder),
        mode=mode,
        # no git: it would keep the address of the remote, which may hold a token; records have the commit
        settings=wandb.Settings(silent=True, console="off", reinit="create_new", disable_git=True, save_code=False),
    )


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
