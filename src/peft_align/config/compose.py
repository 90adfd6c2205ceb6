"""Composes configurations through Hydra, once for each option that is used, and swaps them in for each run.

Composing a run costs Hydra 60 to 110 ms; a grid has thousands. So k composes cover k options of every group at once,
and a run is built by taking whole group nodes as plain values and resolving their interpolations after the swap.
The result equals `hydra.compose` with the same overrides (held by a test).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from peft_align.config import validate
from peft_align.config.schema import GROUPS, TOP_LEVEL, Config
from peft_align.errors import Fault, InputError, suggest

REFERENCE = re.compile(r"^\$\{([A-Za-z_][\w]*(?:\.[A-Za-z_][\w]*)*)\}$")
ABSENT = re.compile(r"In '([^']+)': Could not (?:load|find) '([^']+)'")  # Hydra's word for a default that is none
Assignments = Mapping[str, Any]


def config_dir() -> Path:
    """The shipped conf/: in the wheel beside the package, in a checkout at the repository's root."""
    packaged = Path(str(files("peft_align"))) / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "conf"


@dataclass(frozen=True)
class Built:
    """One group of one run: the checked dataclass, its plain values, and the text that its identity is made of."""

    value: Any
    plain: dict[str, Any]
    canonical: str


class ConfigSpace:
    """The options of every group, composed on demand."""

    def __init__(self, config_dirs: Sequence[Path] = (), hydra_overrides: Sequence[str] = ()) -> None:
        self.dirs = [config_dir(), *config_dirs]
        searchpath = f"hydra.searchpath=[{','.join(map(_quoted, config_dirs))}]"
        self._hydra = [searchpath] if config_dirs else []
        self._nodes: dict[tuple[str, str], dict[str, Any]] = {}
        self._references: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {}
        self._built: dict[str, Built | None] = {}
        self.faults = self._check_hydra(hydra_overrides)  # told together with those of the overrides
        base = self._compose([])
        choices = base["__choices__"]
        self.defaults: dict[str, str] = {group: choices[group] for group in GROUPS}
        self.top: dict[str, Any] = {key: base[key] for key in TOP_LEVEL}
        unknown = set(base) - set(GROUPS) - set(TOP_LEVEL) - {"__choices__"}
        if unknown:
            raise InputError(Fault("conf/config.yaml", f"unknown key '{k}'", suggest(k, GROUPS)) for k in unknown)
        for group, option in self.defaults.items():
            self._keep(group, option, base[group])

    def _check_hydra(self, overrides: Sequence[str]) -> list[Fault]:
        """Each by itself, since Hydra stops at the first."""
        faults = []
        for override in overrides:
            try:
                self._compose([override])
                self._hydra.append(override)
            except InputError as error:
                told = error.faults[0].what.split(". ")[0]
                faults.append(Fault(override, told, _hydra_hint(override)))
        return faults

    def options(self, group: str) -> list[str]:
        """Names of the options of a group, the user's included."""
        return sorted({path.stem for d in self.dirs for path in (d / group).glob("*.yaml")})

    def file(self, group: str, option: str) -> Path | None:
        """The YAML file of an option, if there is one."""
        if option not in self.options(group):  # whatever its text is: no name of a file
            return None
        return next((path for d in self.dirs if (path := d / group / f"{option}.yaml").is_file()), None)

    def load(self, group: str, option: str) -> dict[str, Any]:
        """The plain values of an option that stands outside the composition (a grid, a benchmark)."""
        path = self.file(group, option)
        if path is None:
            raise InputError([Fault(f"{group}={option}", "no such option", self.hint(group, option))])
        return read_yaml(path)

    def hint(self, group: str, option: str) -> str:
        """What was probably meant by an option that is none."""
        other = f"{option}.yml"
        if any(other in [path.name for path in (d / group).glob("*.yml")] for d in self.dirs):
            return f"rename {other} to {option}.yaml"
        return suggest(option, self.options(group))

    def prefetch(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Compose the options that are missing: the i-th missing option of every group in the i-th composition."""
        missing: dict[str, list[str]] = {}
        for group, option in dict.fromkeys(wanted):
            if (group, option) not in self._nodes:
                missing.setdefault(group, []).append(option)
        for i in range(max(map(len, missing.values()), default=0)):
            batch = {group: options[i] for group, options in missing.items() if i < len(options)}
            composed = self._compose([f"{group}={option}" for group, option in batch.items()])
            for group, option in batch.items():
                self._keep(group, option, composed.get(group))

    def node(self, group: str, option: str) -> dict[str, Any]:
        """The unresolved plain values of one option. Treat as read-only."""
        if (group, option) not in self._nodes:
            self.prefetch([(group, option)])
        return self._nodes[group, option]

    def _keep(self, group: str, option: str, node: Any) -> None:
        if node is None and not self.load(group, option):
            node = {}  # an empty file: what is missing is told with the rest
        if isinstance(node, dict) and list(node) == [group] and isinstance(node[group], dict):
            what = f"its settings stand under '{group}:'"
            raise InputError([Fault(f"{group}/{option}.yaml", what, "write them at its top, without it")])
        if not isinstance(node, dict):
            what = f"a mapping is expected under '{group}', and the file gives none"
            raise InputError(
                [Fault(f"{group}/{option}.yaml", what, "write the settings at its top, without a package")]
            )
        self._nodes[group, option] = node
        self._references[group, option] = tuple(_references(node, group))

    def _compose(self, overrides: list[str]) -> dict[str, Any]:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(self.dirs[0]), version_base="1.3", job_name="peft_align"):
                cfg = compose("config", overrides=[*self._hydra, *overrides], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
            raise InputError([self._why(overrides, error)]) from None
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        return {**cast(dict[str, Any], OmegaConf.to_container(plain)), "__choices__": choices}

    def _why(self, overrides: Sequence[str], error: Exception) -> Fault:
        """What is wrong with options that could not be composed. Raises InputError with it where it is a file."""
        for override in overrides:
            group, _, option = override.partition("=")
            if group in GROUPS and (path := self.file(group, option)) is not None:
                read_yaml(path)
        reason = " ".join(str(error).split())
        if match := ABSENT.search(reason):
            group, _, option = match[2].rpartition("/")
            return Fault(f"{match[1]}.yaml: defaults", f"there is no {match[2]}", suggest(option, self.options(group)))
        cause = f" {' '.join(str(error.__cause__).split())}" if error.__cause__ else ""
        return Fault(" ".join(overrides) or "conf/config.yaml", (reason + cause)[:400])

    def value(self, values: Mapping[str, Any], key: str) -> Any:
        """The option of a group or the value of a setting that a run with these values has; None if it has none."""
        if key in values:
            return values[key]
        if key in GROUPS:
            return self.defaults[key]
        choices = {group: values.get(group, self.defaults[group]) for group in GROUPS}
        return _Lookup(self, choices, {k: v for k, v in values.items() if k not in GROUPS}, [])(key)

    def build(
        self, choices: Mapping[str, str], assignments: Assignments, faults: list[Fault]
    ) -> tuple[Config, dict[str, Built]] | None:
        """The checked config of one run: the chosen options, with `assignments` (dotted keys) put over them.

        Adds what is wrong to `faults` and returns None then.
        """
        by_group: dict[str, dict[str, Any]] = {}
        for key, v in assignments.items():
            by_group.setdefault(key.partition(".")[0], {})[key] = v
        before = len(faults)
        for group in GROUPS:  # what refers to an option of no kind would be told as a fault of its own
            validate.kind_of(group, self.node(group, choices[group]), faults)
        if len(faults) > before:
            return None
        parts: dict[str, Built] = {}
        failed = False
        for group in GROUPS:
            built = self._group(group, choices, by_group.get(group, {}), assignments, faults)
            failed = failed or built is None
            if built is not None:
                parts[group] = built
        top: dict[str, Any] = {}
        lookup = _Lookup(self, choices, assignments, faults)
        for key in TOP_LEVEL:
            node = self.top[key]
            if isinstance(node, dict):
                node = {name: assignments.get(f"{key}.{name}", v) for name, v in node.items()}
            top[key] = lookup.resolve(assignments.get(key, node), key)
        before = len(faults)
        leaf = validate.leaves()
        seed = validate.check(top["seed"], int, leaf["seed"].rule, "seed", faults)
        root = validate.check(top["root"], str, leaf["root"].rule, "root", faults)
        nested = {k: validate.convert(validate.hints(Config)[k], top[k], k, faults) for k in ("hub", "disk")}
        if failed or len(faults) > before:
            return None
        groups = {group: part.value for group, part in parts.items()}
        return Config(**groups, seed=seed, root=root, **nested), parts

    def _group(
        self,
        group: str,
        choices: Mapping[str, str],
        assigned: Assignments,
        assignments: Assignments,
        faults: list[Fault],
    ) -> Built | None:
        option = choices[group]
        node = self.node(group, option)
        lookup = _Lookup(self, choices, assignments, faults)
        before = len(faults)
        assigned = {key: lookup.resolve(v, key) for key, v in assigned.items()}
        referenced = [lookup.resolve(text, where) for where, text in self._references[group, option]]
        cache_key = repr((group, option, sorted(assigned.items()), referenced))
        if cache_key in self._built and len(faults) == before:
            return self._built[cache_key]
        plain = _assign(node, group, assigned)
        plain = lookup.resolve(plain, group)
        built = None
        if len(faults) == before:
            cls = validate.kind_of(group, plain, faults)
            checked = cls and validate.convert(cls, plain, group, faults)
            if checked is not None and cls is not None:
                built = Built(checked, plain, canonical(cls, checked))
        if len(faults) == before:  # faults are told anew each time, with their place
            self._built[cache_key] = built
        return built


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file; interpolations stay as they are. Raises InputError if it cannot be read."""
    try:
        container = OmegaConf.to_container(OmegaConf.load(path))  # plain YAML would read 5e-5 as text
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise InputError([unreadable(path, error)]) from None
    if not isinstance(container, dict):
        what = f"a mapping is expected at the top of the file, not {validate.show(container)}"
        raise InputError([Fault(str(path), what, "write KEY: VALUE lines")])
    return cast(dict[str, Any], container)


def unreadable(path: Path, error: Exception) -> Fault:
    """Why a YAML file cannot be read, in the words of its place."""
    at = str(path)
    if isinstance(error, FileNotFoundError):
        return Fault(at, "is not there", "name a file that is")
    if isinstance(error, OSError):
        return Fault(at, f"cannot be read: {error.strerror}", "name a file that can")
    if isinstance(error, RecursionError):
        return Fault(at, "cannot be read: it is nested too deeply", "write it flatter")
    if isinstance(error, UnicodeDecodeError):
        return Fault(at, f"is not UTF-8 (byte {error.start})", "save it as UTF-8")
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        about = " ".join(str(part) for part in (error.context, error.problem) if part)
        return Fault(
            f"{at}: {place}", f"is not YAML: {about}", "write KEY: VALUE lines, and text with : or [ in it in quotes"
        )
    return Fault(
        at,
        f"is not YAML: {' '.join(str(error).split())[:300]}",
        "write KEY: VALUE lines, and text with : or [ in it in quotes",
    )


class _Lookup:
    """Resolves interpolations against one run's options and assignments."""

    def __init__(
        self, space: ConfigSpace, choices: Mapping[str, str], assignments: Assignments, faults: list[Fault]
    ) -> None:
        self.space, self.choices, self.assignments, self.faults = space, choices, assignments, faults
        self.active: list[str] = []

    def __call__(self, key: str, where: str = "") -> Any:
        """The value of a setting, which `where` refers to."""
        if key in self.active:
            what = f"refers to itself through {' -> '.join([*self.active, key])}"
            self.faults.append(Fault(key, what, "give one of them a value"))
            return None
        self.active.append(key)
        try:
            if key in self.assignments:
                return self.resolve(self.assignments[key], key)
            head, _, tail = key.partition(".")
            node: Any = self.space.node(head, self.choices[head]) if head in GROUPS else self.space.top.get(head)
            for name in filter(None, tail.split(".")):
                if not isinstance(node, dict) or name not in node:
                    at, what = f"{where}=${{{key}}}", "refers to a setting that does not exist"
                    self.faults.append(Fault(at, what, suggest(key, validate.leaves())))
                    return None
                node = node[name]
            return self.resolve(node, key)
        finally:
            self.active.pop()

    def resolve(self, node: Any, where: str) -> Any:
        if isinstance(node, dict):
            return {k: self.resolve(v, f"{where}.{k}") for k, v in node.items()}
        if isinstance(node, list):
            return [self.resolve(v, where) for v in node]
        if not isinstance(node, str) or "${" not in node:
            return node
        match = REFERENCE.match(node)
        return self(match[1], where) if match else self._by_omegaconf(node, where)

    def _by_omegaconf(self, text: str, where: str) -> Any:
        """What is more than a plain reference (resolvers, text around it) is OmegaConf's business."""
        everything: dict[str, Any] = dict(self.space.top)
        for group in GROUPS:
            everything[group] = self.space.node(group, self.choices[group])
        cfg = OmegaConf.create(everything)
        for key, v in self.assignments.items():
            OmegaConf.update(cfg, key, v, force_add=True)
        try:
            OmegaConf.update(cfg, where, text, force_add=True)
            found = OmegaConf.select(cfg, where)
        except OmegaConfBaseException as error:
            reason = " ".join(str(error).splitlines()[0].split())[:200]
            hint = "write a value, or ${GROUP.SETTING}"
            self.faults.append(Fault(where, f"'{text}' cannot be resolved: {reason}", hint))
            return None
        return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def _references(node: Any, where: str) -> Iterable[tuple[str, str]]:
    """Each interpolated text of a node, with its place."""
    if isinstance(node, dict):
        for name, v in node.items():
            yield from _references(v, f"{where}.{name}")
    elif isinstance(node, list):
        for v in node:
            yield from _references(v, where)
    elif isinstance(node, str) and "${" in node:
        yield where, node


def _hydra_hint(override: str) -> str:
    """What was probably meant by a key of Hydra's own settings."""
    node: Any = OmegaConf.structured(HydraConf)
    for name in override.lstrip("+~").partition("=")[0].split(".")[1:]:
        if not OmegaConf.is_dict(node) or name not in node:
            return suggest(name, map(str, node)) if OmegaConf.is_dict(node) else ""
        node = node[name] if not OmegaConf.is_missing(node, name) else None
    return ""


def _quoted(folder: Path) -> str:
    """A folder as Hydra's grammar takes it, whatever its name."""
    escaped = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return f"'file://{escaped}'"


def _assign(node: dict[str, Any], group: str, assigned: Assignments) -> dict[str, Any]:
    """A copy of the node with the dotted keys set; the node itself stays as it is."""
    if not assigned:
        return node
    copy: dict[str, Any] = json.loads(json.dumps(node))
    for key, v in assigned.items():
        *path, name = key.removeprefix(f"{group}.").split(".")
        place = copy
        for step in path:
            place = place.setdefault(step, {})
        place[name] = v
    return copy


def canonical(cls: type, instance: Any) -> str:
    """The scientific fields of a checked dataclass as JSON with sorted keys: what identity hashes."""
    return json.dumps(scientific(cls, instance), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def scientific(cls: type, instance: Any) -> dict[str, Any]:
    """The scientific fields of a checked dataclass, as plain values."""
    kept: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.metadata["rule"].scientific:
            v = getattr(instance, f.name)
            kept[f.name] = scientific(type(v), v) if dataclasses.is_dataclass(v) else v
    return kept
