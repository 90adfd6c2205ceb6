"""What all verbs share: reading the command line, composing the sweep, and how errors end a program."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_align.config.command_line import CommandLine, parse
from peft_align.config.compose import ConfigSpace
from peft_align.errors import Fault, InputError, WorkError, disk_fault
from peft_align.grid.expand import build_sweep
from peft_align.grid.external import with_adapters
from peft_align.grid.planner import Item, Planner, conditions, judge_identity
from peft_align.grid.runs import Sweep
from peft_align.grid.serialize import config_of
from peft_align.store.records import keep_others_from_writing
from peft_align.store.sweeps import latest_manifest, sweep_dir
from peft_align.terminal import say, say_what_ends_us

ADAPTER = "adapter"  # adapters that were not trained here
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
# A place where nothing can be read or written, whoever tries again.
UNUSABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
}


@dataclass
class Asked:
    """A command line, and the sweep it asks for."""

    line: CommandLine
    sweep: Sweep
    planner: Planner
    space: ConfigSpace = field(default_factory=ConfigSpace)

    @property
    def root(self) -> Path:
        return self.planner.root

    @cached_property
    def folder(self) -> Path:
        """The sweep's folder: another one for other runs, and for other evaluations of them."""
        content = [
            f"{run.id} {sorted(repr((s.steps, conditions(b, s))) for s in run.scorings for _, b in s.benchmarks)}"
            + "".join(sorted({f" {name} {judge_identity(j)}" for s in run.scorings for name, _, j in s.judges}))
            + "".join(sorted({f" {s.base.base_precision}" for s in run.scorings if s.evaluation.base_precision}))
            for run in self.sweep.runs
        ]
        return sweep_dir(self.root, self.sweep.name, content)

    def plan(self) -> list[Item]:
        return self.planner.plan(self.sweep.runs)


def ask(argv: Sequence[str], flags: Sequence[str] = (), *, own: Sequence[str] = (), latest: bool = False) -> Asked:
    """Parse and compose. Raises InputError.

    Args:
        argv: the command line.
        flags: the verb's own flags.
        own: the verb's own keys, which are no settings of a run.
        latest: without a grid or overrides, take the sweep that was started last under the root.
    """
    own = [*own, ADAPTER]
    line = parse(argv, flags, own)
    root = Path(str(line.value("root", "outputs")))
    named = line.grids or line.hydra or line.selected
    only_root = not named and ADAPTER not in line.own and all(override.key == "root" for override in line.overrides)
    if only_root and not line.faults:
        manifest = latest_manifest(root) if latest else None
        if manifest is None:
            what = f"there is no sweep under {root}" if latest else "nothing is asked for"
            raise InputError(
                [Fault("command line", what, "give +grid=NAME or overrides, e.g. +grid=quickstart; see --help")]
            )
        line = dataclasses.replace(remembered(manifest, root, line.config_dirs, own), flags=line.flags)
    return composed(line)


def remembered(
    manifest: Mapping[str, Any], root: Path, config_dirs: Sequence[Path] = (), own: Sequence[str] = (ADAPTER,)
) -> CommandLine:
    """The command line that a sweep was started with, under the root where it lies now; --config-dir adds."""
    words = [word for word in manifest["command"] if not word.lstrip("+").startswith("root=")]
    folders = dict.fromkeys([*manifest["config_dirs"], *map(str, config_dirs)])
    return parse([*words, f"root={root}", *(f"--config-dir={folder}" for folder in folders)], own=own)


def composed(line: CommandLine) -> Asked:
    """The sweep that a command line asks for. Raises InputError."""
    space = ConfigSpace(line.config_dirs, line.hydra)
    sweep = build_sweep(space, line)
    if ADAPTER in line.own:
        sweep = with_adapters(sweep, list(map(str, line.own[ADAPTER])))
    own_root = Path(sweep.config.root)
    if os.path.lexists(own_root) and not own_root.is_dir():
        what = "is a link that leads nowhere" if own_root.is_symlink() else "is not a folder"
        raise InputError([Fault(f"root={own_root}", what, "give the folder of your results, or one to be made")])
    return Asked(line, sweep, Planner(own_root, sweep.config.hub.mirror), space)


def resolved(sweep: Sweep) -> str:
    """The fully resolved config of the sweep's first run, as YAML."""
    from omegaconf import OmegaConf

    runs = [run for run in sweep.runs if not run.is_parent_only]
    others = f"; the first of {len(runs)} runs, narrow with overrides" if len(runs) > 1 else ""
    return f"# {runs[0].id}{others}\n{OmegaConf.to_yaml(config_of(runs[0]))}"


def _terminated(signum: int, frame: Any) -> None:
    """Leave as an interruption does: workers save what they have."""
    raise KeyboardInterrupt


def run_verb(verb: Callable[[list[str]], int], help_text: str | None) -> int:
    """Run a verb: --help first; bad input is told without a traceback."""
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        say((help_text or "").strip())
        return 0
    keep_others_from_writing()
    say_what_ends_us()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return verb(argv)
    except InputError as error:
        say(error.render(), file=sys.stderr)
        return BAD_INPUT
    except WorkError as error:
        say(f"peft_align: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        say("stopped; the same command goes on with what is missing", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if told := disk_fault(error):
            say(
                f"peft_align: {told}\nwhat is finished is kept; the same command goes on with the rest", file=sys.stderr
            )
            return BAD_INPUT if error.errno == errno.EROFS else FAILED
        if error.filename is None or error.errno not in UNUSABLE:
            raise
        hint = "give another root=DIR, or move away what is in its place"
        what = f"{error.filename}: {error.strerror}; results cannot be read or kept there"
        say(f"peft_align: {what} ({hint})", file=sys.stderr)
        return BAD_INPUT
