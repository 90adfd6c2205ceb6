"""What `report` is asked to report on: a sweep, several together, tables alone, what was published; and when again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from peft_align.cli import Asked, ask, composed, remembered
from peft_align.config.command_line import CommandLine, parse, take_values
from peft_align.config.compose import ConfigSpace
from peft_align.errors import Fault, InputError
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Sweep
from peft_align.grid.union import united
from peft_align.launch.outcome import settle
from peft_align.reporting.subject import Place, Subject, elsewhere, is_free, of_published, of_sweep, of_tables, state_of
from peft_align.store.runs import RunDir
from peft_align.store.sweeps import find_sweep, read_manifest, sweep_dir

ANY_NUMBER = 10**6
SOURCES = {"--sweeps": (1, ANY_NUMBER), "--from": (1, ANY_NUMBER), "--published": (0, 0)}
VALUES = SOURCES | {"--to": (1, 1), "--serve": (0, 1), "--every": (1, 1)}
FLAGS = ["--ended"]
EVERY = 30.0  # seconds


@dataclass(frozen=True)
class Source:
    """What a report is asked of.

    Attributes:
        subject: reads what is there now.
        state: changes when the report would.
    """

    subject: Callable[[], Subject]
    state: Callable[[], str]


@dataclass(frozen=True)
class Wanted:
    """A command line of `report`.

    Attributes:
        port: where the report is served; 0: any that is free; None: it is not.
        every: seconds between two looks while it is.
    """

    source: Source
    ended: bool
    port: int | None
    every: float


@dataclass
class Several:
    """Sweeps that were started before, as one."""

    asked: list[Asked]

    @cached_property
    def sweep(self) -> Sweep:
        return united([asked.sweep for asked in self.asked])

    @property
    def folder(self) -> Path:
        """Where their report goes: the first one's root, in a folder of these sweeps."""
        names = [asked.folder.name for asked in self.asked]
        name = "-".join(dict.fromkeys(asked.sweep.name for asked in self.asked))
        return reports(self.asked[0].root) / sweep_dir(Path(), name, names).name

    def roots(self) -> dict[Path, list[str]]:
        """The ids of the runs that the sweeps of each root have."""
        found: dict[Path, dict[str, None]] = {}
        for asked in self.asked:
            found.setdefault(asked.root.resolve(), {}).update(dict.fromkeys(run.id for run in asked.sweep.runs))
        return {root: list(ids) for root, ids in found.items()}

    def subject(self, to: Path | None) -> Subject:
        mirrors = {asked.root.resolve(): asked.sweep.config.hub.mirror for asked in self.asked}
        places = []
        for root, ids in self.roots().items():
            own = set(ids)
            items = Planner(root, mirrors[root], keep=True).plan(run for run in self.sweep.runs if run.id in own)
            places.append(Place(root, items))
        return of_sweep(self.asked[0].space, self.sweep, places, to or self.folder)


def wanted(argv: Sequence[str]) -> Wanted:
    """Read the command line of `report`. Raises InputError."""
    given, rest, faults = take_values(argv, VALUES)
    port = _number("--serve", given["--serve"] or ["0"], 0, 65535, faults) if "--serve" in given else None
    every = _number("--every", given.get("--every") or [str(EVERY)], 0.1, 86400, faults)
    if "--every" in given and "--serve" not in given:
        faults.append(Fault("--every", "says how often a report that is served is written again", "add --serve"))
    sources = [flag for flag in SOURCES if flag in given]
    if len(sources) > 1:
        what = "a report is of sweeps, of tables, or of the published numbers"
        faults.append(Fault(" ".join(sources), what, "give one of them"))
    if faults:
        raise InputError(faults)
    to = Path(given["--to"][0]) if "--to" in given else None
    if to is not None:
        is_free(to)
    if "--from" in given:
        line = _alone("--from", rest, [])
        source = _of_tables([Path(path) for path in given["--from"]], line, to)
    elif "--published" in given:
        line = _alone("--published", rest, ["root"])
        source = _of_published(line, to)
    elif "--sweeps" in given:
        line = _alone("--sweeps", rest, ["root"])
        source = _of_sweeps(given["--sweeps"], line, to)
    else:
        asked = ask(rest, FLAGS, latest=True)
        line = asked.line
        source = _of_one(asked, to)
    return Wanted(source, "--ended" in line.flags, None if port is None else int(port), every)


def _number(flag: str, values: Sequence[str], least: float, most: float, faults: list[Fault]) -> float:
    """The value of a flag as a number; a whole one where the least is."""
    whole = isinstance(least, int)
    try:
        found = int(values[-1]) if whole else float(values[-1])
    except ValueError:
        found = -1
    if not least <= found <= most:
        kind = "whole number" if whole else "number"
        faults.append(Fault(f"{flag} {values[-1]}", f"is no {kind} from {least:g} to {most:g}", f"write {flag} NUMBER"))
    return found


def _alone(flag: str, rest: Sequence[str], keys: Sequence[str]) -> CommandLine:
    """The words beside a flag that has the report be of what is there as it is. Raises InputError."""
    line = parse(rest, FLAGS)
    faults = list(line.faults)
    words = [*(o.text for o in line.overrides if o.key not in keys), *line.hydra]
    words += [f"+grid={name}" for name in line.grids] + [f"+selected={path}" for path in line.selected]
    then = "what is published" if flag == "--published" else "what was asked for then"
    what = f"with {flag} the report is of {then}"
    faults += [Fault(word, what, f"leave it out, or leave out {flag}") for word in words]
    if flag in ("--from", "--published") and line.flags & set(FLAGS):
        faults.append(Fault("--ended", "of tables alone there are no jobs", "leave it out"))
    if faults:
        raise InputError(faults)
    return line


def _of_one(asked: Asked, to: Path | None) -> Source:
    """The sweep of a command line, or the one that was started last."""

    def subject() -> Subject:
        planner = Planner(asked.root, asked.planner.mirror, keep=True)  # nothing remembered of before
        items = planner.plan(asked.sweep.runs)
        found = of_sweep(asked.space, asked.sweep, [Place(asked.root, items)], asked.folder)
        return elsewhere(replace(found, sweep=asked.sweep), to)

    ids = [run.id for run in asked.sweep.runs]
    files = [asked.folder / "sweep.json"]
    return Source(subject, lambda: state_of([(asked.root, ids)], files))


def _of_sweeps(names: Sequence[str], line: CommandLine, to: Path | None) -> Source:
    """Sweeps by their names: one, or several as one."""
    root = _root(line)
    faults: list[Fault] = []
    found: dict[Path, Asked] = {}
    for name in names:
        try:
            folder = find_sweep(root, name)
            manifest = read_manifest(folder)
            found[folder.resolve()] = composed(remembered(manifest, _root_of(folder), line.config_dirs))
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(faults)
    if len(found) == 1:
        return _of_one(next(iter(found.values())), to)
    several = Several(list(found.values()))
    files = [folder / "sweep.json" for folder in found]
    return Source(lambda: several.subject(to), lambda: state_of(list(several.roots().items()), files))


def _root(line: CommandLine) -> Path:
    """The root that a command line names."""
    return Path(str(line.value("root", "outputs")))


def reports(root: Path) -> Path:
    """Where reports go that are of no single sweep."""
    return root / "sweeps" / "reports"


def _root_of(folder: Path) -> Path:
    """The root of a sweep's folder. Raises InputError."""
    if folder.resolve().parent.name != "sweeps":
        what = "does not lie in the folder sweeps/ of a root, where its runs are looked for"
        raise InputError([Fault(f"--sweeps {folder}", what, "give ROOT/sweeps/NAME")])
    return folder.resolve().parent.parent


def _of_tables(paths: Sequence[Path], line: CommandLine, to: Path | None) -> Source:
    """Tables without what they were made from."""
    space = ConfigSpace(line.config_dirs)
    return Source(lambda: of_tables(space, paths, to), lambda: state_of([], paths))


def _of_published(line: CommandLine, to: Path | None) -> Source:
    """The study's own numbers."""
    space = ConfigSpace(line.config_dirs)
    folder = to or reports(_root(line)) / "published"
    return Source(lambda: of_published(space, folder), lambda: state_of([]))


def settle_all(subject: Subject) -> None:
    """The jobs of a cluster have ended: record why what is not done stopped."""
    for place in subject.places:
        settle([RunDir(place.root, item.run.id) for item in place.items if not item.done])
