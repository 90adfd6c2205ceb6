"""The training runs of a sweep by kind: the memory that each takes of a GPU, the card that suffices, the time."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft_align.config.schema import DPO, Config
from peft_align.grid import duration
from peft_align.grid.cost import Measured, human_bytes, human_time, likeness, measured_paces
from peft_align.grid.footprint import CARDS, choice, estimate, largest_budget, tokens_at_once
from peft_align.grid.planner import Item
from peft_align.grid.resources import allocation
from peft_align.grid.runs import Run

NAMES = ("model", "method", "peft")
SETTINGS = (  # by which kinds of one name are told apart
    *("train.engine", "train.max_length", "train.batch_size", "train.micro_batch_size", "train.micro_batch_tokens"),
    *("train.gradient_checkpointing", "train.optimizer", "train.max_steps", "method.init", "peft.base_precision"),
    *("peft.double_quantization", "peft.compute_dtype", "peft.adapter_dtype", "peft.dropout", "peft.target_modules"),
    *("train.pack_runs", "model.attention", "model.shape"),
)


def kinds_of(items: Iterable[Item], records: Sequence[Measured]) -> list[dict[str, Any]]:
    """One entry for each kind of training run, its sizes in bytes, its times in seconds.

    Args:
        items: of the plan.
        records: of its runs that are done; what is measured counts more than what is computed.
    """
    groups: dict[str, list[Run]] = {}
    for item in items:
        if item.run.kind == "train":
            groups.setdefault(repr((_named(item.run), _settings(item.run), _processes(item.run))), []).append(item.run)
    paces, lengths = measured_paces(records), _measured_tokens(records)
    entries = [_entry(runs, paces, lengths) for runs in groups.values()]
    by_name: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        by_name.setdefault(tuple(entry[key] for key in (*NAMES, "r")), []).append(entry)
    for alike in by_name.values():
        same = [key for key in SETTINGS if all(e["settings"].get(key) == alike[0]["settings"].get(key) for e in alike)]
        for entry in alike:
            entry["settings"] = {key: value for key, value in entry["settings"].items() if key not in same}
    return entries


def _entry(
    runs: Sequence[Run], paces: Mapping[tuple[str, ...], float], lengths: Mapping[tuple[str, ...], float]
) -> dict[str, Any]:
    run, config, processes = runs[0], runs[0].config, _processes(runs[0])
    entry: dict[str, Any] = {**_named(run), "runs": len(runs), "processes": processes, "settings": _settings(run)}
    entry["gradient_checkpointing"] = config.train.gradient_checkpointing
    entry["tokens_at_once"] = tokens_at_once(config, processes=processes)
    choices = {card: choice(config, card, processes) for card in CARDS}
    entry["fits_gb"] = next((card for card, found in choices.items() if found), None)
    entry["cards"] = {str(card): dataclasses.asdict(found) if found else None for card, found in choices.items()}
    both = [estimate(config, checkpointing=way, processes=processes) for way in (False, True)]
    entry |= {
        "bytes": None,
        "peak_bytes": None,
        "budget": _budget(config),
        "largest": None,
        "advice": None,
    }
    if both[0] and both[1]:
        mine = both[bool(config.train.gradient_checkpointing)]
        assert mine is not None
        entry["bytes"] = {name: round(value) for name, value in dataclasses.asdict(mine).items()}
        entry["peak_bytes"] = {"kept": round(both[0].total), "recomputed": round(both[1].total)}
        entry["largest"] = {
            way: {str(card): largest_budget(config, card, checkpointing=again, processes=processes) for card in CARDS}
            for way, again in (("kept", False), ("recomputed", True))
        }
        entry["advice"] = None if entry["fits_gb"] else advice(config, processes)
    known = [lengths.get(_texts(each)) for each in runs]
    tokens = statistics.fmean(filter(None, known)) if all(known) else None
    entry["tokens_per_sample"] = duration.longest_tokens(config) if tokens is None else tokens
    entry["tokens_measured"] = tokens is not None
    pace = paces.get(likeness(run))
    entry["measured_seconds"] = None if pace is None else pace * config.train.max_steps
    entry["seconds"] = {}
    for card in duration.CARDS:
        found = choices[card.size]
        again = found.recomputed if found else bool(config.train.gradient_checkpointing)
        seconds = duration.training_seconds(config, card, tokens, recomputed=again, processes=processes)
        entry["seconds"][card.name] = round(seconds, 1)
    return entry


def advice(config: Config, processes: int = 1) -> dict[str, Any] | None:
    """The fewest of three settings, in this order, with which a run fits a card, and its GB; None if none help."""
    words = []
    for key, value, changed in _smaller(config, CARDS[-1], processes):
        words.append(f"{key}={value}")
        fitting = [card for card in CARDS if choice(changed, card, processes)]
        if fitting:
            return {"settings": words, "fits_gb": fitting[0]}
    return None


def _smaller(config: Config, card: int, processes: int) -> Iterator[tuple[str, Any, Config]]:
    """What takes less memory, each on top of the one before it: setting, value, config."""
    asked = config.train.gradient_checkpointing
    if asked is False or (asked is None and config.train.engine == "trl"):
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_checkpointing=True))
        yield "train.gradient_checkpointing", "true", config
    budget = largest_budget(config, card, processes=processes)
    if budget is None and config.train.gradient_checkpointing is None:  # then the engine recomputes
        budget = largest_budget(config, card, checkpointing=True, processes=processes)
    if budget and getattr(config.train, _budget(config).partition(".")[2]) is not None:
        changes: dict[str, Any] = {_budget(config).partition(".")[2]: budget}
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
        yield _budget(config), budget, config
    if config.peft.base_precision != "nf4":
        peft = dataclasses.replace(config.peft, base_precision="nf4", double_quantization=True)
        yield "peft", "qlora", dataclasses.replace(config, peft=peft)


def lines(entries: Iterable[Mapping[str, Any]], most: int) -> tuple[list[str], int]:
    """Entries in columns, a line each, those of models of one size together; and how many lines are left out."""
    found: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        cells = (_kind(entry), _memory(entry), _fits(entry), _time(entry) + _advice(entry))
        found.setdefault(cells, []).append(entry["model"])
    rows = [(f"{'|'.join(models)} {cells[0]}", *cells[1:]) for cells, models in found.items()]
    shown, left = rows[:most], len(rows[most:])
    widths = [max((len(row[i]) for row in shown), default=0) for i in range(3)]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)) for row in shown], left


def _kind(entry: Mapping[str, Any]) -> str:
    settings = [f"{key.partition('.')[2]}={value}" for key, value in entry["settings"].items()]
    return " ".join([entry["method"], entry["peft"], f"r={entry['r']}", *settings])


def _memory(entry: Mapping[str, Any]) -> str:
    if entry["peak_bytes"] is None:
        return "memory unknown: other modules"
    mine, other, word = "kept", "recomputed", "with"
    if entry["gradient_checkpointing"]:
        mine, other, word = "recomputed", "kept", "without"
    sizes = entry["peak_bytes"]
    at = f"{entry['tokens_at_once']:,} tokens"
    return f"{human_bytes(sizes[mine])} at {at} ({human_bytes(sizes[other])} {word} gradient checkpointing)"


def _fits(entry: Mapping[str, Any]) -> str:
    if entry["peak_bytes"] is None:
        return ""
    if not entry["fits_gb"]:
        return "fits no card"
    chosen = entry["gradient_checkpointing"] is None and entry["cards"][str(entry["fits_gb"])]["recomputed"]
    return f"fits {entry['fits_gb']} GB" + (" with gradient checkpointing" if chosen else "")


def _advice(entry: Mapping[str, Any]) -> str:
    found = entry["advice"]
    return f"   fits {found['fits_gb']} GB with {' '.join(found['settings'])}" if found else ""


def _time(entry: Mapping[str, Any]) -> str:
    if entry["measured_seconds"] is not None:
        return f"{human_time(entry['measured_seconds'])} as measured"
    bound = "~" if entry["tokens_measured"] else "up to ~"
    return f"{bound}{about(entry['seconds'][duration.SHOWN_CARD.name])} on an A100"


def about(seconds: float) -> str:
    """35 min"""
    if seconds < 60:
        return "1 min"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


def _named(run: Run) -> dict[str, Any]:
    return {**{name: run.choices[name] for name in NAMES}, "r": run.config.peft.r}


def _budget(config: Config) -> str:
    """The setting that says how much is in a forward pass."""
    return "train.micro_batch_tokens" if config.train.engine == "packed" else "train.micro_batch_size"


def _settings(run: Run) -> dict[str, Any]:
    """Those that memory or time depend on."""
    found: dict[str, Any] = {}
    for key in SETTINGS:
        group, *names = key.split(".")
        value: Any = getattr(run.config, group)
        for name in names:
            value = getattr(value, name, None)
        if (key == _budget(run.config) or not key.startswith("train.micro_batch")) and not (
            key == "method.init" and not isinstance(run.config.method, DPO)
        ):
            found[key] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return found


def _processes(run: Run) -> int:
    return allocation(run.config.resources, "train", run).gpus or 1


def _texts(run: Run) -> tuple[str, ...]:
    """What runs share whose texts are as long: the data, its tokenizer, how much of a text and of a pair is read."""
    names = (run.choices[name] for name in ("dataset", "preference", "model"))
    return (*names, run.config.method.kind, str(run.config.train.max_length))


def _measured_tokens(records: Iterable[Measured]) -> dict[tuple[str, ...], float]:
    """Tokens of a sample's texts together, as done runs had them."""
    found: dict[tuple[str, ...], list[float]] = {}
    for run, record in records:
        if record.get("samples") and record.get("tokens"):
            found.setdefault(_texts(run), []).append(record["tokens"] / record["samples"])
    return {alike: statistics.fmean(values) for alike, values in found.items()}
