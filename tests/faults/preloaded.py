"""A process that has imported what sweeps and their workers import, and forks both: starting them takes no time.

Reads a request a line: {"words", "folder", "environment", "output", "fault"}, answers with the pid of a sweep, and with
{"pid", "code"} when it has ended. What is forked does what `python -m peft_align.sweep` and its workers do.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from audit import Fault, install

PR_SET_CHILD_SUBREAPER = 36
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")
hook = install()
IMPORTED = (
    "peft_align.sweep", "peft_align.plan", "peft_align.launch.job", "peft_align.launch.local",
    "peft_align.launch.distributed", "peft_align.training.run", "peft_align.training.pack_runs",
    "peft_align.evaluation.suite", "peft_align.evaluation.judging", "peft_align.evaluation.local_judges",
    "peft_align.evaluation.divergence", "peft_align.evaluation.generation", "peft_align.models.merged",
    "profanity_check", "trl", "lm_eval", "lm_eval.models.huggingface", "pyarrow.parquet",
)  # fmt: skip


class Forked:
    """In the place of subprocess.Popen in the sweep's launcher: the worker is a fork."""

    def __init__(self, command: Sequence[str], *, stdin: Any, stdout: Any, stderr: Any, env: dict[str, str], **_: Any):
        assert command[1:3] == ["-m", "peft_align.launch.job"]
        self.returncode: int | None = None

        def work() -> int:
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            hook.role = "worker"
            if hook.fault:
                hook.open_log(hook.fault)
            sys.argv = list(command[2:])
            return sys.modules["peft_align.launch.job"].main(list(command[3:]))  # type: ignore[no-any-return]

        self.pid = forked(work, stdout.fileno())

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def forked(work: Callable[[], int], output: int) -> int:
    """The pid of a fork that works and exits as an interpreter does."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        try:
            code = work()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def started(request: dict[str, Any]) -> int:
    """The pid of a sweep, or of another verb."""

    def sweep() -> int:
        os.setsid()
        signal.set_wakeup_fd(-1)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        hook.role = "sweep"
        sys.argv = [f"peft_align.{request['verb']}", *request["words"]]
        hook.arm(Fault(**request["fault"]))
        return sys.modules[f"peft_align.{request['verb']}"].main()  # type: ignore[no-any-return]

    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        return forked(sweep, output)
    finally:
        os.close(output)


def main() -> None:
    """Serve until the input ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    from peft_align.evaluation.lm_eval_tasks import task_manager

    task_manager(None)
    local: Any = sys.modules["peft_align.launch.local"]
    kept = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired", "run")}
    local.subprocess = SimpleNamespace(Popen=Forked, **kept)
    print("ready", flush=True)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = set(map(int, CHILDREN.read_text().split()))
    living: set[int] = set()
    codes: dict[int, int] = {}
    rest = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            content = os.read(0, 65536)
            if not content:
                return
            *lines, rest = (rest + content).split(b"\n")
            for line in lines:
                pid = started(json.loads(line))
                living.add(pid)
                print(json.dumps({"started": pid}), flush=True)
        codes |= {pid: code for pid, code in ended() if pid in living}
        living -= set(codes)
        if codes and set(map(int, CHILDREN.read_text().split())) <= living | before:  # workers die with their sweep
            for pid, code in codes.items():
                print(json.dumps({"pid": pid, "code": code}), flush=True)
            codes = {}


def ended() -> Iterator[tuple[int, int]]:
    """The children that have ended, and how; those of sweeps that have ended are children too."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], os.waitstatus_to_exitcode(found[1])


if __name__ == "__main__":
    main()
