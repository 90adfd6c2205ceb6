"""What the verbs show, their examples, and cases that cross rooms."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from sweeping import expand, finish_evaluation, finish_training, metric, plan, trained, write_option

from peft_align.cli import ADAPTER, FAILED, ask, run_verb
from peft_align.config.command_line import parse, take_values
from peft_align.config.compose import ConfigSpace
from peft_align.errors import InputError, WorkError
from peft_align.grid.planner import requests
from peft_align.reported import VALUES
from peft_align.reporting.table import rows
from peft_align.store.records import Digests, sha256, write_json
from peft_align.store.runs import FORMAT, RunDir

Verb = Callable[..., "subprocess.CompletedProcess[str]"]
FLAGS = ("--json", "--cfg")
RUNS_A_VERB = """
import importlib, sys
name, sys.argv = sys.argv[1], sys.argv[1:]
code = importlib.import_module(f"peft_align.{name}").main()
print("torch imported" if "torch" in sys.modules else "no torch", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_an_attempt_recorded_in_another_format_does_not_replace_what_is_done(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "run")
    for folder, content, version in ((directory.path, "old", FORMAT), (directory.attempt, "new", FORMAT - 1)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(content, encoding="utf-8")
        whole = {"checkpoints": {"4": {"files": {}, "digest": ""}}, "metrics": {}, "parents": {}, "inputs": {}}
        write_json(folder / "train.json", {"of": content, "format": version, **whole})
    directory.commit_attempt()
    assert (directory.train_record() or {}).get("of") == "old"
    assert (directory.path / "metrics.jsonl").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("entry", [[], [3], "cut", None])
def test_a_damaged_entry_of_the_memory_is_computed_again(tmp_path: Path, entry: object) -> None:
    path, memory = tmp_path / "weights", tmp_path / "digests.json"
    path.write_bytes(b"abc")
    stat = path.stat()
    kept = [stat.st_size, stat.st_mtime_ns] if entry == "cut" else entry
    write_json(memory, {str(path.resolve()): kept})
    assert Digests(memory).of(path) == sha256(path)


def test_what_two_blocks_ask_of_one_run_is_united(tmp_path: Path) -> None:
    text = """
    blocks:
      - {name: one, axes: {seed: [0]}, set: {model: tiny, evaluation.benchmarks: [preference]}}
      - {name: two, axes: {seed: [0]}, set: {model: tiny, evaluation.benchmarks: [everyday_mc, preference]}}
    """
    write_option(tmp_path, "grid/mine", text)
    (run,) = trained(expand("+grid=mine", space=ConfigSpace([tmp_path])))
    assert sorted(request.benchmark for request in requests(run, None)) == ["everyday_mc", "preference"]


def test_a_run_that_is_not_complete_has_the_rows_that_exist(tmp_path: Path) -> None:
    words = ("model=tiny", "dataset=everyday", "train.max_steps=4", "train.checkpoint_steps=[2,4]", "seed=0,1")
    sweep = expand(*words, "evaluation.benchmarks=[preference,everyday_mc]")
    finish_training(tmp_path, trained(sweep)[0])
    finish_evaluation(tmp_path, plan(sweep, tmp_path)[0].requests[0], [metric("accuracy", 0.5)])
    items = plan(sweep, tmp_path)
    assert not items[0].done
    (row,) = rows(sweep, items, tmp_path)
    assert (row["run_id"], row["step"], row["benchmark"]) == (trained(sweep)[0].id, 2, "preference")


def test_scores_stay_in_the_table_while_a_further_step_is_asked(tmp_path: Path) -> None:
    words = ("model=tiny", "dataset=everyday", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]")
    sweep, more = expand(*words), expand(*words, "train.checkpoint_steps=[2,4]")
    finish_training(tmp_path, trained(sweep)[0])
    for request in plan(sweep, tmp_path)[0].requests:
        finish_evaluation(tmp_path, request, [metric("acc", 0.5)])
    found = rows(more, plan(more, tmp_path), tmp_path)
    assert [(row["kind"], row["step"]) for row in found] == [("train", 4)]


def test_faults_of_a_grid_file_are_told_with_grid_and_block(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("conf")
    write_option(folder, "grid/wrong", "blocks: [{name: one, axes: {methd: [sft], model: [mistal_7b], peft.r: [0]}}]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        ask(["+grid=wrong", "--config-dir", str(folder)], FLAGS)
    text = caught.value.render()
    assert text.startswith("peft_align: 3 faults"), text
    assert all("grid/wrong.yaml" in line and "blocks[0]" in line for line in text.splitlines()[1:]), text
    for message in ("did you mean 'method'?", "did you mean 'mistral_7b'?", "at least 1"):
        assert message in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plan", "sweep", "export"])
@pytest.mark.parametrize("words", [[], ["+grdi=full"], ["hydra.vrbose=1"], ["seed="]], ids=str)
def test_refused_programs_exit_with_2(here: Verb, tmp_path: Path, name: str, words: list[str]) -> None:
    done = here(name, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["report"]], ids=" ".join)
def test_verbs_that_only_look_import_no_torch_even_where_there_are_results(tmp_path: Path, words: list[str]) -> None:
    asked = ["model=tiny", "dataset=everyday", "seed=0,1", "evaluation.benchmarks=[everyday_mc]"]
    sweep, root = expand(*asked), tmp_path / "outputs"
    for run in trained(sweep):
        finish_training(root, run)
    for request in [request for item in plan(sweep, root) for request in item.requests]:
        finish_evaluation(root, request, [metric("acc", 0.5)])
    command = [sys.executable, "-c", RUNS_A_VERB, *words, *asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "no torch")
    assert done.stdout


@pytest.mark.parametrize("name", ["plan", "sweep", "train"])
def test_the_shown_config_is_yaml_without_open_references(here: Verb, tmp_path: Path, name: str) -> None:
    done = here(name, "+grid=quickstart", "method=dpo", "peft=lora", "--cfg", check=True)
    config = OmegaConf.create(done.stdout)
    assert (config.method.kind, config.model.source, config.train.max_steps) == ("dpo", "cache", 8)
    assert "${" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plan", "sweep", "train", "evaluate", "judge", "status", "report"])
def test_the_examples_of_the_help_can_be_run(name: str) -> None:
    text = importlib.import_module(f"peft_align.{name}").__doc__ or ""
    start = f"python -m peft_align.{name}"
    examples = [shlex.split(line)[3:] for line in text.partition("examples:")[2].splitlines() if start in line]
    assert len(examples) == 3
    for words in examples:
        given, words, faults = take_values(words, VALUES if name == "report" else {})
        line = parse(words, FLAGS, own=[ADAPTER])
        assert [*line.faults, *faults] == []
        if line.grids or any(override.key != "root" for override in line.overrides):
            assert expand(*(word for word in words if word not in FLAGS and not word.startswith(f"{ADAPTER}="))).runs
        else:
            assert name == "status" or given, words


def test_work_that_fails_for_a_reason_told_in_full_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(argv: list[str]) -> int:
        raise WorkError("the figures could not be drawn: exit code -9")

    monkeypatch.setattr("sys.argv", ["peft_align"])
    assert run_verb(verb, "") == FAILED
    assert capsys.readouterr().err == "peft_align: the figures could not be drawn: exit code -9\n"
