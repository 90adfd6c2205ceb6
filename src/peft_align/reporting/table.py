"""The result table: one row for each run, step, benchmark and metric; and its summary over seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from peft_align.config.identity import short_hash
from peft_align.config.schema import GROUPS, MAIN_AXES
from peft_align.grid.cost import BYTES
from peft_align.grid.planner import Item
from peft_align.grid.runs import Run, Sweep
from peft_align.reporting.frame import KEY, Frame, frame_of, in_table, to_plain
from peft_align.reporting.statistics import t_interval
from peft_align.reporting.told import Told, told_of
from peft_align.store.records import atomic_write
from peft_align.terminal import one_line, shown

FIRST = ("run_id", "kind", *MAIN_AXES, "base")
LAST = (
    *("seed", "step", "samples", "benchmark", "judge", "metric"),
    *("value", "stderr", "bound", "n", "higher_is_better"),
)
FORMULA = ("=", "+", "-", "@", "\t")  # what a text may not begin with, or a spreadsheet computes it
NOT_TRAINED = ("baseline", "external")
Row = dict[str, Any]


def columns(sweep: Sweep | Frame) -> list[str]:
    """The table's columns: fixed ones, with the sweep's further axes by their dotted keys in between."""
    return [*FIRST, *(key for key in sweep.axis_keys if key not in (*MAIN_AXES, "seed")), *LAST]


def rows(
    sweep: Sweep,
    items: Sequence[Item],
    root: Path,
    told: Mapping[str, Told] | None = None,
    identities: dict[str, list[Any]] | None = None,
) -> list[Row]:
    """Every result of the sweep that is on disk, in the order of its runs. Parents that it only needs are left out.

    Args:
        sweep: what is asked for.
        items: the state of its runs.
        root: where they lie.
        told: what was read of them; None: it is read now.
        identities: what each judge is by its name, added to: of several roots the same judges have the same names.
    """
    names = columns(sweep)
    found = []
    by_id = sweep.by_id()
    identities = {} if identities is None else identities
    told = told_of(items, root) if told is None else told
    for item in items:
        if item.run.is_parent_only:
            continue
        for scored in told[item.run.id].scored:
            shared = _shared(names, item, scored.record, by_id)
            shared["judge"] = _judge_label(scored.record, identities)
            found += [shared | _measured(item.run, scored.record, metric) for metric in scored.record["metrics"]]
    return found


def _judge_label(record: Mapping[str, Any], identities: dict[str, list[Any]]) -> str | None:
    """The name of a record's judge; judges of one name that are not the same are numbered."""
    label: str | None = record.get("judge")
    if label is None:
        return None
    known, own = identities.setdefault(label, []), record["key"]["judge"]
    if own not in known:
        known.append(own)
    return judge_name(label, known.index(own))


def judge_name(label: str, number: int) -> str:
    """How the table names a judge: others of the same name are numbered, from 2."""
    return f"{label} #{number + 1}" if number else label


def judges_of(identities: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """The hash of what each judge is, by its name in the table."""
    named = {judge_name(label, i): own for label, known in identities.items() for i, own in enumerate(known)}
    return {name: short_hash(json.dumps(own, sort_keys=True)) for name, own in named.items()}


def _shared(names: Sequence[str], item: Item, record: Mapping[str, Any], by_id: Mapping[str, Run]) -> Row:
    """What the rows of one record have in common, and every other column empty."""
    run = item.run
    row: Row = dict.fromkeys(names)
    row["base"] = record.get("base", run.base)
    if run.kind in NOT_TRAINED:
        # no adapter of ours: peft tells the precision of the base; a held-out set of pairs is named, if there is one
        row |= {"model": run.choices["model"], "peft": run.base, "method": run.axes.get("adapter")}
        row |= {"dataset": record["dataset"], "preference": record["preference"]}
    else:
        row |= {key: run.choices[key] for key in MAIN_AXES} | {"seed": run.config.seed}
        row |= {key: _shared_setting(run, key, by_id) for key in _further(names)}
        row |= {"merge": None} if run.kind == "train" and "merge" in row else {}
        row |= {"inputs": run.axes["inputs"]} if run.kind == "merge" else {}
        row |= {"samples": record["step"] * run.config.train.batch_size} if run.kind == "train" else {}
    return row | {"run_id": run.id, "kind": run.kind, "step": record["step"]}


def _measured(run: Run, record: Mapping[str, Any], metric: Mapping[str, Any]) -> Row:
    """The columns of one metric."""
    value, stderr, bound = (
        None if (v := metric.get(key)) is None else float(v) for key in ("value", "stderr", "bound")
    )
    return {
        "benchmark": measured_on(run, record, metric),
        "metric": metric["name"],
        "value": value,
        "stderr": stderr,
        "bound": bound,
        "n": metric.get("n"),
        "higher_is_better": metric.get("higher_is_better"),
    }


def measured_on(run: Run, record: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """The benchmark of a metric, with the part of it that it is of, and the split if that is not the test split."""
    part = f"/{metric['part']}" if metric["part"] else ""
    if run.kind == "merge" and record["preference"]:
        part = f"/{_heldout_set(run, record)}"  # its inputs may be aligned to several
    if record["key"].get("split", "test") != "test":
        part += f"/{record['key']['split']}"
    return f"{record['benchmark']}{part}"


def _further(names: Sequence[str]) -> Sequence[str]:
    """The columns of a sweep's further axes."""
    return names[len(FIRST) : -len(LAST)]


def _heldout_set(run: Run, record: Mapping[str, Any]) -> str:
    """The preference whose pairs a merge was scored on, with the dataset where its inputs have several."""
    several = len({scoring.dataset_name for scoring in run.scorings}) > 1
    return f"{record['dataset']}_{record['preference']}" if several else str(record["preference"])


def _shared_setting(run: Run, key: str, by_id: Mapping[str, Run]) -> Any:
    """What a run was made with; of a merge, what its inputs were, if that is one value."""
    if key in GROUPS:
        return run.choices[key]
    if run.kind != "merge" or key.partition(".")[0] == "merge":
        return _setting(run.config, key)
    values = [_setting(by_id[parent].config, key) for parent in run.parents]
    return values[0] if all(v == values[0] for v in values) else None


def _setting(config: Any, dotted: str) -> Any:
    """The value of a dotted setting; None if the run has no such setting."""
    for name in dotted.split("."):
        config = getattr(config, name, None)
    return in_table(config)


def write_csv(path: Path, names: Sequence[str], table: Sequence[Row]) -> None:
    """Write the rows as CSV, numbers in full precision, atomically. Raises ValueError where one has another column."""
    known = set(names)
    if strange := next((row.keys() - known for row in table if not row.keys() <= known), None):
        raise ValueError(f"{path.name} has no column {', '.join(sorted(strange))}")
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")  # which writes a float as repr does
        writer.writerow(names)
        writer.writerows(zip(*map(_as_text, _by_column(names, table)), strict=True))


def _by_column(names: Sequence[str], table: Sequence[Row]) -> Iterable[Sequence[Any]]:
    """The values of each column; None where a row does not have it. Rows have no others."""
    if not table:
        return [()] * len(names)
    if len(names) > 1 and all(len(row) == len(names) for row in table):
        return zip(*map(itemgetter(*names), table), strict=True)
    return ([row.get(name) for row in table] for name in names)


def _as_text(values: Sequence[Any]) -> Sequence[Any]:
    """A column as CSV has it: numbers as they are, each text looked at once."""
    kinds = set(map(type, values))
    if kinds <= {int, float, type(None)}:
        return values
    if kinds <= {str, type(None)}:
        told = {value: text for value in set(values) if value is not None and (text := _text(value)) != value}
        return [told.get(value, value) for value in values] if told else values
    return [_text(value) if isinstance(value, (str, bool)) else value for value in values]


def _text(value: str | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    value = shown(value)
    return f"'{value}" if value.startswith(FORMULA) else value  # as spreadsheets mark a text


TYPES = {
    **dict.fromkeys(("value", "stderr", "bound"), "float64"),
    **dict.fromkeys(("n", "step", "samples", "seed"), "int64"),
    "higher_is_better": "bool",
}  # of columns of the Parquet file; the other fixed ones are strings, an axis is float64 or a string


def write_parquet(path: Path, names: Sequence[str], table: Sequence[Row], frame: Frame | None = None) -> None:
    """Write the rows as Parquet, typed: numbers as numbers, axes as numbers where all their values are.

    With `frame` the file also says, in its metadata, what the report needs of the sweep, and which values
    of axes a typed column has in another form (8 as 8.0, true as "True").
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays, restored = [], {}
    for name, values in zip(names, _by_column(names, table), strict=True):
        further = name not in (*FIRST, *LAST)
        kinds = set(map(type, values)) - {type(None)}
        numeric = further and all(issubclass(kind, (int, float)) and kind is not bool for kind in kinds)
        kind = pa.type_for_alias(TYPES.get(name, "float64" if numeric else "string"))
        is_text = kind == pa.string() and not kinds <= {str}
        arrays.append(pa.array([None if v is None else str(v) for v in values] if is_text else values, kind))
        if further:
            as_is = float if numeric else str
            other = () if kinds <= {as_is} else values
            restored[name] = {str(as_is(v)): v for v in other if v is not None and not isinstance(v, as_is)}
    written = pa.Table.from_arrays(arrays, names=list(names))
    if frame is not None:
        said = json.dumps(to_plain(frame) | {"restored": restored})
        written = written.replace_schema_metadata({KEY: said.encode()})
    with atomic_write(path) as temporary:
        pq.write_table(written, temporary)


def markdown(sweep: Sweep | Frame, table: Sequence[Row]) -> str:
    """The summary: a row for each cell and step, a column for each metric, mean ± 95% t interval over seeds.

    Shown are the metrics that the benchmarks' options name; the CSV holds all.
    """
    named = frame_of(sweep).metrics
    there = {(row["benchmark"], row["metric"]) for row in table}
    shown_here = {measure for measure in there if _is_shown(named, *map(str, measure))}
    table = _spread_baselines([row for row in table if (row["benchmark"], row["metric"]) in shown_here])
    if not table:
        return "No results yet.\n"
    keys = [*MAIN_AXES, *_further(columns(sweep)), "step"]
    varying = [k for k in keys if k in ("method", "peft") or differ(row[k] for row in table)]
    several = len({(row["peft"], row["base"]) for row in table}) > len({row["peft"] for row in table})
    if several or any(row["kind"] == "merge" and row["base"] not in BYTES for row in table):
        varying.insert(varying.index("peft") + 1, "base")  # not what the kind of adapter says
    if len({row["step"] for row in table if row["kind"] == "train"}) > 1:
        varying.append("samples")
    table = _by_judge(table)
    measures = list(dict.fromkeys((row["benchmark"], row["metric"]) for row in table))
    table = [row if row["method"] else row | {"method": "baseline"} for row in table]
    if _conditions_differ(table, varying):  # what differs is no column: it must not pass for seeds
        table = [row | {"run": f"{row['run_id'][-12:]} n={row['n']}"} for row in table]
        varying = ["run", *varying]
    cells: dict[tuple[Any, ...], dict[tuple[str, str], list[float]]] = {}
    for key, row in zip(map(itemgetter(*varying), table), table, strict=True):  # method and peft at least: a tuple
        cells.setdefault(key, {}).setdefault((row["benchmark"], row["metric"]), []).append(row["value"])
    better = {(row["benchmark"], row["metric"]): row["higher_is_better"] for row in table}
    arrows = {True: " ↑", False: " ↓", None: ""}
    head = [*varying, *(f"{b} {m}{arrows[better[b, m]]}" for b, m in measures), "seeds"]
    body = []
    for key, values in cells.items():
        seeds = max(len(v) for v in values.values())
        shown = [_cell(values.get(measure)) for measure in measures]
        body.append([*("" if part is None else str(part) for part in key), *shown, str(seeds)])
    fixed = "; ".join(
        f"{k}: {value}"
        for k in keys
        if k not in varying and (value := next((r[k] for r in table if r[k] is not None), None)) is not None
    )
    judges = dict.fromkeys((str(row["benchmark"]).split(" (")[0], row["judge"]) for row in table if row["judge"])
    judged = ", ".join(f"{benchmark} by {judge}" for benchmark, judge in judges)
    note = "± is the 95% t interval over seeds." if any("±" in cell for line in body for cell in line) else ""
    told = [fixed and f"{for_markdown(fixed)}.", judged and f"Judged: {for_markdown(judged)}.", note]
    caption = "\n".join(filter(None, told))
    return f"{aligned(head, body)}\n{caption}\n" if caption else aligned(head, body)


def _by_judge(table: Sequence[Row]) -> list[Row]:
    """Where several judges scored one benchmark, a column for each of them: what they say is never mixed."""
    judges: dict[str, set[str]] = {}
    for row in table:
        judges.setdefault(row["benchmark"], set()).update({row["judge"]} if row["judge"] else ())
    return [
        row | {"benchmark": f"{row['benchmark']} ({row['judge']})"}
        if row["judge"] and len(judges[row["benchmark"]]) > 1
        else row
        for row in table
    ]


def _conditions_differ(table: Sequence[Row], keys: Sequence[str]) -> bool:
    """Whether a cell has two values of one metric for one seed."""
    return len(set(map(itemgetter(*keys, "seed", "benchmark", "metric"), table))) < len(table)


def differ(values: Iterable[Any]) -> bool:
    """Whether they are not all the same; 1, 1.0 and true are not."""
    left = iter(values)
    first = next(left, None)
    return any(value is not first and repr(value) != repr(first) for value in left)


def _is_shown(named: Mapping[str, Sequence[str]], benchmark: str, metric: str) -> bool:
    """Whether the option of a benchmark names a metric of it."""
    metrics = named.get(benchmark.partition("/")[0], ["*"])
    return "*" in metrics or metric.partition(",")[0] in metrics


def _spread_baselines(table: Sequence[Row]) -> list[Row]:
    """Show a baseline's scores that belong to no dataset beside each of its held-out sets, not in another row."""
    sets: dict[str, dict[tuple[str, str], None]] = {}
    for row in table:
        if row["kind"] in NOT_TRAINED and row["dataset"] is not None:
            sets.setdefault(row["run_id"], {})[row["dataset"], row["preference"]] = None
    spread = []
    for row in table:
        if row["kind"] in NOT_TRAINED and row["dataset"] is None:
            places = sets.get(row["run_id"], {(None, None): None})
            spread += [row | {"dataset": dataset, "preference": preference} for dataset, preference in places]
        else:
            spread.append(row)
    return spread


def _cell(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    interval = t_interval(values)
    mean = f"{interval.mean:.3f}"
    return mean if interval.half_width is None else f"{mean} ± {interval.half_width:.3f}"


def for_markdown(text: str) -> str:
    """A name as it stands in a table: with a bar it would begin another cell, with a < HTML."""
    return one_line(shown(text)).replace("|", "\\|").replace("<", "\\<")


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal."""
    head, *body = ([for_markdown(cell) for cell in line] for line in [head, *body])
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

    def one(line: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([one(head), rule, *map(one, body)]) + "\n"
