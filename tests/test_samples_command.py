"""`samples`: from a step, a jump of the loss or a failure back to the rows and their texts."""

from __future__ import annotations

import importlib
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, trained

from peft_align import samples
from peft_align.data.pairs import Message, Pair
from peft_align.errors import InputError
from peft_align.grid.serialize import config_of
from peft_align.reporting.lookup import Sample, Step, place, worst
from peft_align.store.records import write_json
from peft_align.store.runs import FORMAT, RunDir

Verb = Callable[..., "subprocess.CompletedProcess[str]"]
WORDS = ("model=tiny", "dataset=everyday", "method=dpo", "preference=harmless")
ROWS = ["harmless-0001", "harmless-0002", "harmless-0003", "harmless-0004"]


def line(step: int, loss: float, **more: Any) -> dict[str, Any]:
    """A line of metrics of a step whose rows go round."""
    at = (step - 1) * 2 % 4
    rows = {"rows": ROWS[at : at + 2], "row_tokens": [40, 50], "row_losses": [loss - 0.25, loss + 0.25]}
    return {"step": step, "loss": loss, "grad_norm": 1.5, **rows, **more}


def run_with(root: Path, losses: list[float], *, attempt: bool = False, **failure: Any) -> RunDir:
    """A run on disk that made steps of these losses."""
    (run,) = trained(expand(*WORDS, f"root={root}"))
    directory = RunDir(root, run.id)
    write_json(directory.path / "run.json", {"id": run.id, "kind": "train", "config": config_of(run)})
    path = (directory.attempt if attempt else directory.path) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line(i, loss)) + "\n" for i, loss in enumerate(losses, start=1))
    path.write_text(text + '{"step": 9, "lo', encoding="utf-8")  # a kill cut the last line
    if failure:
        directory.fail("train", "TrainingFailed: so it was", **failure)
    return directory


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the verb prints; it must succeed."""
    assert samples.verb(list(words)) == 0
    return capsys.readouterr().out


def faults(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        samples.verb(list(words))
    return caught.value.render()


def test_the_rows_of_a_step_are_shown_with_loss_lengths_and_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, [0.7, 0.6, 0.9])
    text = told(capsys, run.id, "--step", "2", f"root={tmp_path}")
    assert "step 2: loss 0.6000 (step 1: 0.7000), gradient norm 1.5" in text
    first, second = text.index("row harmless-0004 of train, loss 0.8500, 50 tokens"), text.index("row harmless-0003")
    assert first < second, "the largest loss comes first"
    assert "loss 0.3500, 40 tokens" in text
    for name in ("prompt", "chosen", "rejected"):
        assert text.count(f"    {name:8}") == 2
    assert "'user: " in text or '"user: ' in text
    assert "harmless-0001" not in text


def test_without_a_step_those_are_shown_at_which_the_loss_rose_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, [0.7, 0.6, 0.9, 0.5, 2.0, 1.9])
    text = told(capsys, run.id, f"root={tmp_path}", "--worst=2")
    assert [row.split(":")[0] for row in text.splitlines() if row.startswith("step ")] == ["step 5", "step 3"]
    content = json.loads(told(capsys, "--json", run.id, f"root={tmp_path}", "--worst", "4"))
    assert [step["step"] for step in content["steps"]] == [5, 3, 1, 2]
    sample = content["steps"][0]["samples"][0]
    assert (sample["row"], sample["split"], sample["loss"], sample["tokens"]) == ("harmless-0002", "train", 2.25, 50)
    assert sample["prompt"][0]["role"] == "user"
    assert sample["chosen"] != sample["rejected"]
    assert content["warning"] is None


def test_a_loss_that_is_no_number_is_the_largest_jump_and_plain_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, [0.7, 9.0, math.nan], attempt=True)
    content = told(capsys, run.id, f"root={tmp_path}", "--json", "--worst", "1")
    (step,) = json.loads(content, parse_constant=pytest.fail)["steps"]
    assert (step["step"], step["loss"], step["loss_before"]) == (3, "nan", 9.0)
    assert "step 3: loss nan" in told(capsys, run.id, f"root={tmp_path}")


def test_of_a_run_that_failed_the_rows_that_it_failed_at_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, [0.7, math.nan], attempt=True, step=2, what="loss", rows=["harmless-0004"])
    text = told(capsys, run.id, f"root={tmp_path}")
    assert "train: TrainingFailed: so it was" in text
    assert "step 2: loss nan" in text
    assert "row harmless-0004 of train" in text
    assert "row harmless-0003" not in text
    run.fail("train", "TrainingFailed: so it was", what="reference", rows=["harmless-0001"])
    (run.attempt / "metrics.jsonl").unlink()
    assert "row harmless-0001 of train\n" in told(capsys, run.id, f"root={tmp_path}")


def test_data_that_has_changed_is_said_and_rows_that_are_gone_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, [0.7])
    metrics = run.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("harmless-0001", "harmless-9999"))
    saved = {"4": {"files": {"a": {"size": 0, "sha256": "0" * 64}}, "digest": "d"}}
    record = {"format": FORMAT, "checkpoints": saved, "metrics": {}, "parents": {}}
    record["inputs"] = {"data": {"files": {}, "digest": "another"}}
    write_json(run.path / "train.json", record)
    text = told(capsys, run.id, f"root={tmp_path}", "--step", "1")
    assert "warning: everyday has changed since" in text
    assert "row harmless-9999 of train, loss 0.4500, 40 tokens\n    is not in the data any more" in text


def test_what_is_asked_wrongly_is_told_at_once(tmp_path: Path) -> None:
    run = run_with(tmp_path, [0.7, 0.6])
    text = faults("--stp", "--step", "x", "--worst=0", "rot=a", "root=")
    for fault in (
        "--stp: no such flag (did you mean '--step'?)",
        "--step: 'x' is not a whole number above 0",
        "--worst: '0'",
        "rot=a: is none of this verb's settings (did you mean 'root'?",
        "root=: the value is empty",
        "0 runs are named",
    ):
        assert fault in text
    assert "2 runs are named" in faults(run.id, run.id)
    assert "one of them can be had" in faults(run.id, "--step=1", "--worst=1")
    assert "there are steps 1 to 2" in faults(run.id, "--step=3", f"root={tmp_path}")
    assert f"did you mean '{run.id}'?" in faults(run.id[:-1], f"root={tmp_path}")
    assert "root=DIR" in faults(run.id, f"root={tmp_path / 'nowhere'}")
    assert "there is no such run" in faults(f"../runs/{run.id}", f"root={tmp_path}")


def test_runs_that_have_no_steps_say_so(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "base")
    write_json(directory.path / "run.json", {"id": "base", "kind": "baseline", "config": {}})
    assert "is a run of kind baseline" in faults("base", f"root={tmp_path}")
    write_json(directory.path / "run.json", {"id": "base", "kind": "train", "config": {}})
    assert "has made no step yet" in faults("base", f"root={tmp_path}")
    (directory.path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n', encoding="utf-8")
    assert "dataset" in faults("base", f"root={tmp_path}"), "a record without its settings"


def test_metrics_of_an_earlier_version_are_shown_without_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, [])
    (run.path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n', encoding="utf-8")
    text = told(capsys, run.id, f"root={tmp_path}")
    assert "step 1: loss 0.5000\n" in text
    assert "its rows are not known" in text


def test_what_a_terminal_would_obey_is_escaped_and_long_texts_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    pair = Pair("train:5:harmless", (Message("user", "a\x1b[31m\nb"),), "x" * 1000, "\u202e\x07y")
    samples.show_sample(Sample("train:5:harmless", 0.5, 7, pair))
    text = capsys.readouterr().out
    assert "row 5 of train (harmless), loss 0.5000, 7 tokens" in text
    assert r"'user: a\x1b[31m\nb'" in text
    assert r"'\u202e\x07y'" in text
    assert f"1000 characters  '{'x' * samples.SHOWN}' ..." in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert samples.escaped("a\x1b]0;\u2028", 100) == r"a\x1b]0;\u2028"


@pytest.mark.parametrize(
    ("row", "expected"),
    [("train:12", ("train", 12)), ("train:0:helpful", ("train", 0)), ("helpful-3", ("train", None))],
)
def test_a_row_says_its_split_and_number(row: str, expected: tuple[str, int | None]) -> None:
    assert place(row) == expected


def test_steps_that_rose_equally_come_in_order() -> None:
    steps = [Step(i, 1.0, 1.0, None, (), (), ()) for i in (1, 2, 3)]
    assert [step.number for step in worst(steps, 2)] == [1, 2]
    fell = Step(4, 0.2, 0.9, None, (), (), ())
    assert worst([fell, *steps], 1)[0].number == 1


@pytest.mark.slow
def test_a_training_is_looked_up_without_torch(here: Verb, tmp_path: Path) -> None:
    """From the run itself: its own metrics name rows of the data."""
    words = (*WORDS, "train.max_steps=2", "train.batch_size=4", "train.max_length=200")
    here("train", *words, check=True)
    (run,) = trained(expand(*words))
    program = (
        "import sys; from peft_align.samples import main; code = main()\n"
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, run.id, "--step", "2", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (0, "False")
    (step,) = json.loads(done.stdout)["steps"]
    assert len(step["samples"]) == 4
    assert all(sample["chosen"] and sample["loss"] > 0 for sample in step["samples"])
    refused = here("samples", run.id + "x")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"did you mean '{run.id}'?" in refused.stderr


def test_the_examples_of_the_help_are_read() -> None:
    text = importlib.import_module("peft_align.samples").__doc__ or ""
    examples = [shlex.split(row)[3:] for row in text.partition("examples:")[2].splitlines() if "python -m" in row]
    assert len(examples) == 3
    read = [samples.read(words) for words in examples]
    assert [asked.step for asked in read] == [None, 120, None]
    assert [(asked.worst, asked.as_json) for asked in read] == [(None, False), (None, False), (10, True)]
    assert asdict(read[1])["root"] == Path("/scratch/me/outputs")
