"""Names of grids, blocks, options, folders and models, whatever they are, are never paths or words of a shell."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from sweeping import expand, faults, finish_evaluation, finish_training, metric, plan, shipped, trained, write_option

from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.errors import InputError
from peft_align.grid.expand import build_sweep
from peft_align.grid.planner import Planner
from peft_align.launch import queue
from peft_align.launch.slurm import SlurmLauncher
from peft_align.reporting.table import columns, markdown, rows, write_csv
from peft_align.select import _target
from peft_align.store.submissions import Submission
from peft_align.store.sweeps import sweep_dir

NASTY = {
    "climbs": "../../../escaped",
    "is absolute": "/tmp/escaped",
    "two commands": "a; touch escaped",
    "substitutes": "$(touch escaped)",
    "in backticks": "`touch escaped`",
    "a pipe": "a | touch escaped",
    "breaks the line": "a\ntouch escaped\n",
    "an option": "--wrap=touch escaped",
    "quotes": 'it\'s "mine"',
    "very long": "x" * 3000,
    "of another script": "日本語",
    "turned round": "a\u202eb\u2066c",
    "a homoglyph": "mistrаl_7b",
    "a control": "a\x1b[2Jb\x07",
    "ends": "a\x00b",
    "blank": "   ",
    "a template": "${title}$PATH{x}",
    "a bar": "a|b<script>",
    "a formula": "=cmd|' /C calc'!A0",
}
NAMES = pytest.mark.parametrize("name", NASTY.values(), ids=NASTY)
SMALL = {
    "model": "tiny",
    "dataset": "everyday",
    "peft": "lora",
    "train.max_steps": 4,
    "evaluation.benchmarks": ["everyday_mc"],
}
DRY = ("launcher=slurm", "launcher.dry_run=true")


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(queue, "answers", lambda: False)
    monkeypatch.chdir(tmp_path)


def grid(folder: Path, name: str) -> ConfigSpace:
    """Options with a grid whose own name, block, reason and note are `name`."""
    block = {
        "name": name,
        "axes": {"seed": [0, 1]},
        "set": SMALL,
        "exclude": [{"where": {"seed": 1}, "reason": name if name.strip() else "x"}],
    }
    text = yaml.safe_dump({"name": name, "blocks": [block]}, allow_unicode=True)
    write_option(folder, "grid/mine", text)
    return ConfigSpace([folder])


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def submitted(space: ConfigSpace, words: tuple[str, ...], root: Path) -> Submission:
    sweep = build_sweep(space, parse([*words, *DRY]))
    planner = Planner(root, None)
    launcher = SlurmLauncher(sweep, planner, sweep_dir(root, sweep.name, ["x"]), [*words, *DRY], [])
    found = launcher.submit(planner.plan(sweep.runs))
    assert found is not None
    return found


def check_scripts(submission: Submission, tmp_path: Path) -> None:
    """Each is what a shell takes, and run with another program does nothing but start that."""
    for script in submission.folder.glob("*.sbatch"):
        text = script.read_text(encoding="utf-8")
        assert all(line.startswith(("#", "export ", "exec ")) for line in text.splitlines() if line)
        assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
        harmless = text.replace("exec ", "exec true ")
        done = subprocess.run(["bash", "-c", harmless], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@NAMES
def test_a_grid_of_any_name_makes_one_folder_below_the_root_and_scripts_that_do_nothing_else(
    tmp_path: Path, name: str
) -> None:
    space, root = grid(tmp_path / "conf", name), tmp_path / "deep" / "er" / "root"
    before = files_in(tmp_path)
    submission = submitted(space, ("+grid=mine",), root)
    check_scripts(submission, tmp_path)
    made = files_in(tmp_path) - before
    assert made
    assert all(path.is_relative_to(root) for path in made)
    assert submission.folder.resolve().parents[2] == (root / "sweeps").resolve()
    assert not list(tmp_path.rglob("escaped"))
    assert not Path("/tmp/escaped").exists()


@NAMES
def test_what_a_search_of_any_name_selects_is_written_below_the_root(tmp_path: Path, name: str) -> None:
    from peft_align.cli import Asked

    line = parse(["+grid=mine"])
    sweep = build_sweep(grid(tmp_path / "conf", name), line)
    root = tmp_path / "deep" / "er" / "root"
    target = Path(os.path.normpath(_target(Asked(line, sweep, Planner(root, None)))))
    assert target.parent == root / "selected"


@NAMES
def test_an_option_of_no_plain_name_is_not_read_from_elsewhere(tmp_path: Path, name: str) -> None:
    write_option(tmp_path / "escaped", "x", "blocks: []")
    space = grid(tmp_path / "conf" / "a", "ok")
    assert space.file("grid", name) is None
    with pytest.raises(InputError, match=r"no such option|the value is empty"):
        space.load("grid", name)


@pytest.mark.parametrize(
    "word", ["+grid=../../conf/grid/main", "grid=/etc/passwd", "model=../model/tiny", "judge=../judge/none"]
)
def test_an_option_named_as_a_path_is_a_fault(word: str) -> None:
    assert any("option" in fault for fault in faults(word, "dataset=everyday"))


NAMED_FILES = [
    n for key, n in NASTY.items() if "/" not in n and "\x00" not in n and len(n) < 200 and key != "a control"
]


@pytest.mark.parametrize("name", NAMED_FILES)
def test_an_option_whose_file_has_any_name_makes_plain_run_ids(tmp_path: Path, name: str) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    tiny = shipped().file("model", "tiny")
    assert tiny is not None
    (tmp_path / "conf" / "model" / f"{name}.yaml").write_bytes(tiny.read_bytes())
    space = ConfigSpace([tmp_path / "conf"])
    quoted = name.replace("\\", "\\\\").replace("'", "\\'")
    try:
        sweep = build_sweep(space, parse([f"model='{quoted}'", "dataset=everyday", "method=sft", "peft=lora"]))
    except InputError:
        return  # Hydra's grammar has no such name
    for run in sweep.runs:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,120}", run.id)


@pytest.mark.parametrize(
    "folder",
    ["two words", 'it\'s "mine"', "a;touch escaped", "$(touch escaped)", "`touch escaped`", "日本語", "-rf", "#x %j"],
)
def test_root_and_folder_may_have_any_printable_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    place = tmp_path / folder
    place.mkdir()
    monkeypatch.chdir(place)
    space = grid(tmp_path / "conf", "ok")
    check_scripts(submitted(space, ("+grid=mine",), place / "root"), tmp_path)
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("as_root", [True, False])
@pytest.mark.parametrize("name", ["a\ntouch escaped\n#", "a\rb", "a\u202eb", "a\x1b[2J"])
def test_a_folder_whose_name_breaks_a_line_gets_no_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, as_root: bool
) -> None:
    place = tmp_path / name
    place.mkdir()
    space = grid(tmp_path / "conf", "ok")
    if not as_root:
        monkeypatch.chdir(place)
    with pytest.raises(InputError, match="no script can hold"):
        submitted(space, ("+grid=mine",), place if as_root else tmp_path / "root")
    assert not list(tmp_path.rglob("*.sbatch"))


@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "constraint", "reservation", "gres", "mem", "python", "prefix"]
)
def test_a_resource_with_a_line_break_is_a_fault(key: str) -> None:
    word = f"resources.{key}='gpu\ntouch escaped'"
    assert faults("model=tiny", "dataset=everyday", *DRY, word) == [
        f"resources.{key}: has a line break or another control character (write it in one line)"
    ]


@pytest.mark.parametrize(
    "value", ["a b", "$(touch escaped)", "`touch escaped`", "a;touch escaped", "it's", 'say "x"', "a\\b", "#x"]
)
def test_a_resource_of_any_other_name_stands_in_a_comment(tmp_path: Path, value: str) -> None:
    quoted = value.replace("'", "\\'")
    space = grid(tmp_path / "conf", "ok")
    submission = submitted(space, ("+grid=mine", f"resources.partition='{quoted}'"), tmp_path / "root")
    check_scripts(submission, tmp_path)
    for script in submission.folder.glob("*.sbatch"):
        lines = [line for line in script.read_text(encoding="utf-8").splitlines() if "--partition=" in line]
        assert [shlex.split(line.removeprefix("#SBATCH"), posix=True) for line in lines] == [[f"--partition={value}"]]
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("name", ["../../escaped", "$(touch escaped)", "x" * 5000])
def test_a_task_of_no_such_name_is_a_fault(tmp_path: Path, name: str) -> None:
    assert faults("model=tiny", "dataset=everyday", f"evaluation.benchmarks=['{name}']")


@pytest.mark.parametrize("name", ["../../escaped", "/etc", "a\\\\b", "..", "a/b", ""])
def test_a_prompt_of_no_plain_name_is_a_fault(name: str) -> None:
    for key in ("evaluator", "reference"):
        assert faults(
            "model=tiny",
            "dataset=everyday",
            "evaluation.benchmarks=[alpaca_eval]",
            f"benchmark.alpaca_eval.{key}='{name}'",
        )


# --- In tables


def test_a_table_holds_any_name_as_a_name(tmp_path: Path) -> None:
    sweep = expand(
        "model=tiny",
        "dataset=everyday",
        "peft=lora",
        "method=sft",
        "train.max_steps=4",
        "evaluation.benchmarks=[everyday_mc]",
    )
    for run in trained(sweep):
        finish_training(tmp_path, run)
    names = [name for name in NASTY.values() if name.strip()]
    for request in [request for item in plan(sweep, tmp_path) for request in item.requests]:
        finish_evaluation(tmp_path, request, [metric("acc", 0.5, part=name) for name in names])
    found = rows(sweep, plan(sweep, tmp_path), tmp_path)
    for i, row in enumerate(found):
        row |= {"method": names[i % len(names)]}
    summary = markdown(sweep, found)
    lines = [line for line in summary.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(cells) == 1, "every line has as many cells as the head"
    assert "<script" not in summary.replace("\\<", "")
    assert summary.replace("\n", "").isprintable()
    write_csv(tmp_path / "results.csv", columns(sweep), found)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(found)
    assert not [
        v for row in read for v in row.values() if v[:1] in tuple("=+-@\t\r") and not re.fullmatch(r"-?[\d.]+", v)
    ]
    assert {row["method"] for row in read} >= {"'=cmd|' /C calc'!A0", "'--wrap=touch escaped", 'it\'s "mine"'}


def test_a_plan_of_any_names_is_json_and_shows_them_as_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_align import plan as verb

    monkeypatch.setenv("COLUMNS", "4000")
    name = "[bold]x[/]\x1b]8;;http://evil\x07y\u202e|:warning:"
    grid(tmp_path / "conf", name)
    words = [f"--config-dir={tmp_path / 'conf'}", "+grid=mine"]
    assert verb.verb([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["excluded"] == [{"cells": 1, "reason": name}]
    assert verb.verb(words) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "[bold]x[/]\\x1b]8;;http://evil\\x07y\\u202e|:warning:: 2 runs" in " ".join(told.split())
