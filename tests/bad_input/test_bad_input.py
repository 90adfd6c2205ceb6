"""Bad input is told in one clear message with place and remedy; nothing is started, nothing is lost."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path

import cases_data
import pytest
from bad_input import FAILED, REFUSED, Case, contents, products, run, write
from cases import CASES

Verb = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input_is_told_and_nothing_is_lost(
    case: Case, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(cache))
    before: dict[str, str] = {}

    def prepare(folder: Path) -> list[str]:
        words = case.prepare(folder)
        before.update(contents(folder))
        return words

    done = run(dataclasses.replace(case, prepare=prepare), tmp_path)
    after = contents(tmp_path)
    assert done.code == case.code, done.text
    for message in case.told:
        assert message in done.text, (message, done.text)
    for message in ("Traceback", *case.unsaid):
        assert message not in done.text
    if case.code == REFUSED:
        if case.faults:
            count = "1 fault" if case.faults == 1 else f"{case.faults} faults"
            told = done.err[done.err.index("peft_align: ") :]
            assert told.startswith(f"peft_align: {count} in the input; nothing was started.\n"), done.err
            assert len(told.splitlines()) == 1 + case.faults
        assert done.out == ""
        assert after == before
    kept, made = products(before), products(after)
    lost = [name for name in kept if made.get(name) != kept[name]]
    assert [name for name in lost if not (case.gone and name.endswith(case.gone))] == []
    if case.code == FAILED and done.words[0] in ("train", "judge"):  # others are evaluated beside what failed
        assert made.keys() <= kept.keys()


@pytest.mark.parametrize("name", ["plan", "sweep"])
def test_a_refused_program_exits_with_2_and_leaves_nothing(verb: Verb, tmp_path: Path, name: str) -> None:
    done = verb(name, "a=[1", "--jsn", "hydra.vrbose=1", "model=mistal_7b")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("peft_align: 4 faults in the input; nothing was started.\n")
    for message in ("a=[1: not an override", "--jsn: no such flag", "hydra.vrbose=1", "did you mean 'mistral_7b'?"):
        assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_whose_worker_finds_bad_input_ends_with_1_and_shows_the_message_without_a_traceback(
    verb: Verb, tmp_path: Path
) -> None:
    rows = [*cases_data.hh_rows(), ["a", "list"]]
    write(tmp_path / "mirror" / cases_data.HH / "train.jsonl", cases_data.lines(rows))
    words = (*cases_data.SETTINGS, "dataset=hh_rlhf", cases_data.MIRROR, "evaluation.benchmarks=[everyday_mc]")
    done = verb("sweep", *words)
    shown = done.stdout + done.stderr
    assert done.returncode == 1, shown
    assert "FAILED" in shown
    assert f"{cases_data.HH}/train.jsonl, line 9: is a list, not a row" in shown
    assert "Traceback" not in shown
    again = verb("status", *words)
    assert "line 9: is a list" in again.stdout
