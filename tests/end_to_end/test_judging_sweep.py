"""Sweeps whose texts a server judges, through the command line: complete, and nothing done twice when killed."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, Reply, Request, samples_in

from peft_align.store.journal import Journal, read_entries
from peft_align.store.runs import RunDir

pytestmark = pytest.mark.slow
GENERATED = ("alpaca_eval", "real_toxicity", "red_instruct")
JUDGED = {
    "alpaca_eval": ("endpoint/default", {"win_rate", "failed_rate"}),
    "real_toxicity": ("profanity", {"score", "toxicity", "expected_maximum_toxicity", "toxicity_probability"}),
    "red_instruct": ("endpoint/default", {"safety", "attack_success_rate", "unlabelled_rate"}),
}
LIMIT = 8
CONCURRENCY = 2


def truth(request: Request) -> Reply:
    """An answer that follows from the question alone."""
    bit = hashlib.sha256(request.question.encode()).digest()[0] & 1
    if "[[A]]" in request.question:
        return Reply(f"I think: [[{'AB'[bit]}]]")
    return Reply(f"[{{'model': 'model_1', 'rank': {1 + bit}}}, {{'model': 'model_2', 'rank': {2 - bit}}}]")


def slowly(request: Request) -> Reply:
    return Reply(truth(request).text, delay=0.25)


@pytest.fixture(scope="module")
def running() -> Iterator[JudgeServer]:
    with JudgeServer(truth) as server:
        yield server


@pytest.fixture
def server(running: JudgeServer, undisturbed: Path) -> JudgeServer:
    """The server, with nothing asked yet."""
    running.behave = truth
    running.forget()
    return running


@pytest.fixture(scope="module")
def words(shared: Path) -> list[str]:
    """What is asked for, but for the judge."""
    peers = shared / "peers"
    return [
        "model=tiny", "dataset=everyday", "peft=lora", "method=sft", "train.max_steps=2", "train.batch_size=2",
        "train.max_length=200", f"hub.mirror={shared / 'mirror'}", "launcher.threads=1",
        "evaluation.benchmarks=[alpaca_eval,real_toxicity,red_instruct,divergence,preference]",
        f"evaluation.limit={LIMIT}", "evaluation.heldout=4", "evaluation.batch_size=1",
        f"benchmark.alpaca_eval.prompt_file={peers}/alpaca_eval/evaluators/alpaca_eval_gpt4/alpaca_eval.txt",
        f"benchmark.red_instruct.folder={peers / 'red_instruct'}", "benchmark.real_toxicity.judge=profanity",
        "benchmark.alpaca_eval.max_new_tokens=16", "benchmark.red_instruct.max_new_tokens=16",
        "benchmark.divergence.max_new_tokens=8",
    ]  # fmt: skip


def by(server: JudgeServer) -> list[str]:
    return ["judge=endpoint", f"judge.base_url={server.url}", f"judge.concurrency={CONCURRENCY}"]


def command(verb: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"peft_align.{verb}", *words]


def do(folder: Path, verb: str, *words: str) -> str:
    done = subprocess.run(command(verb, *words), cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command("sweep", *words), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rows(folder: Path) -> list[dict[str, str]]:
    """The table that was written last."""
    path = max((folder / "outputs/sweeps").glob("*/results.csv"), key=lambda path: path.stat().st_mtime_ns)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stamps(folder: Path, pattern: str) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in (folder / "outputs").glob(pattern)}


def texts(folder: Path) -> dict[str, int]:
    """When the texts and their records were written."""
    found = stamps(folder, "runs/*/evaluations/*/*.json") | stamps(folder, "runs/*/evaluations/*/samples.jsonl.gz")
    assert len(found) == 2 * 5 * 2 + 2, "record and samples of five benchmarks, AlpacaEval's outputs, of two runs"
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def kill(sweep: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill a sweep by its id and wait until its workers, which die with it, are gone."""
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    root = folder / "outputs"
    wait_for(lambda: not any(RunDir(root, path.name).is_locked() for path in (root / "runs").iterdir()), 20)


def journal_lines(path: Path) -> list[bytes]:
    """The whole lines of a journal after its head."""
    try:
        return path.read_bytes().split(b"\n")[1:-1]
    except FileNotFoundError:
        return []


@pytest.fixture(scope="module")
def undisturbed(running: JudgeServer, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    told = do(folder, "sweep", *words, *by(running))
    assert "Judged: alpaca_eval by endpoint/default" in told
    assert set(running.asked.values()) == {1}
    assert running.most <= CONCURRENCY
    return folder


def test_the_table_has_every_judged_number_and_says_whose_it_is(undisturbed: Path) -> None:
    table = rows(undisturbed)
    assert {row["kind"] for row in table} == {"train", "baseline"}
    for kind in ("train", "baseline"):
        for benchmark, (judge, metrics) in JUDGED.items():
            judged = [row for row in table if (row["kind"], row["benchmark"]) == (kind, benchmark) and row["judge"]]
            assert Counter(row["metric"] for row in judged) == dict.fromkeys(metrics, 1)
            assert {row["judge"] for row in judged} == {judge}
            assert all(row["value"] and row["n"] == str(LIMIT) for row in judged)
    unjudged = {row["benchmark"] for row in table if not row["judge"]}
    assert unjudged == {*GENERATED, "divergence", "preference"}


def test_the_numbers_are_the_servers_answers(undisturbed: Path) -> None:
    values = {
        (row["run_id"], row["benchmark"], row["metric"]): float(row["value"])
        for row in rows(undisturbed)
        if row["judge"]
    }
    runs = sorted({run for run, _, _ in values})
    assert len(runs) == 2
    for run in runs:
        folders = (undisturbed / "outputs/runs" / run / "evaluations").glob("*/judgements/endpoint-*")
        samples = {path.parents[1].name.partition("-")[0]: samples_in(path) for path in folders}
        bits = [sample["answer"].endswith("[[B]]") for sample in samples["red_instruct"]]
        assert values[run, "red_instruct", "attack_success_rate"] == pytest.approx(100 * sum(bits) / LIMIT)
        wins = [("'model_2', 'rank': 1" in s["answer"]) != s["swapped"] for s in samples["alpaca_eval"]]
        assert values[run, "alpaca_eval", "win_rate"] == pytest.approx(100 * sum(wins) / LIMIT)


def test_the_same_command_again_asks_nothing_and_starts_nothing(
    server: JudgeServer, words: list[str], undisturbed: Path
) -> None:
    before, jobs, table = stamps(undisturbed, "runs/**/*"), stamps(undisturbed, "sweeps/*/jobs/*"), rows(undisturbed)
    assert len(jobs) >= 3
    assert "2 runs, 2 done, 0 to do" in do(undisturbed, "sweep", *words, *by(server))
    assert server.requests == []
    assert stamps(undisturbed, "sweeps/*/jobs/*") == jobs
    assert stamps(undisturbed, "runs/**/*") == before
    assert rows(undisturbed) == table


def test_what_is_judged_later_has_the_same_numbers_and_generates_nothing(
    server: JudgeServer, words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    none = tmp_path / "none"
    none.mkdir()
    without = [word for word in words if "real_toxicity.judge" not in word]
    do(none, "sweep", *without, "judge=none", "benchmark.real_toxicity.judge=none")
    assert server.requests == []
    assert [row for row in rows(none) if row["judge"]] == []
    assert rows(none) == [row for row in rows(undisturbed) if not row["judge"]]
    for verb in ("judge", "evaluate"):
        folder = tmp_path / verb
        shutil.copytree(none, folder)
        before = texts(folder)
        assert before == texts(none)
        server.forget()
        told = do(folder, verb, *words, *by(server))
        assert f"2 runs to {verb}" in told
        assert texts(folder) == before
        assert rows(folder) == rows(undisturbed)
        assert set(server.asked.values()) == {1}
        server.forget()
        assert f"0 runs to {verb}" in do(folder, verb, *words, *by(server))
        assert server.requests == []


def test_a_kill_while_texts_are_generated_loses_none_of_them(
    server: JudgeServer, words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()

    def unfinished() -> dict[Path, list[bytes]]:
        paths = (folder / "outputs/runs").glob("*/evaluations/*/unfinished.jsonl")
        found = {path: journal_lines(path) for path in paths if path.parent.name.startswith(GENERATED)}
        return {path: lines for path, lines in found.items() if not (path.parent / "record.json").is_file()}

    sweep = start(folder, *words, *by(server))
    wait_for(lambda: any(len(lines) >= 2 for lines in unfinished().values()))
    kill(sweep, folder)
    ((journal, lines),) = unfinished().items()
    assert 2 <= len(lines) < LIMIT, "it was killed in the middle"
    assert server.requests == []

    marked = tmp_path / "marked"  # a copy whose finished texts can be told from newly generated ones
    shutil.copytree(folder, marked)
    copy = marked / journal.relative_to(folder)
    head = json.loads(copy.read_bytes().splitlines()[0])["head"]
    kept = read_entries(copy, head)
    assert len(kept) == len(lines)
    changed = [entry | {"raw": f"kept {i}"} for i, entry in enumerate(kept)]
    copy.unlink()
    Journal(copy, head).append(changed)

    do(folder, "sweep", *words, *by(server))
    samples = {sample["id"]: sample for sample in samples_in(journal.parent)}
    for entry in kept:
        assert {name: samples[entry["id"]][name] for name in entry} == entry
    assert not journal.exists()
    assert rows(folder) == rows(undisturbed)
    assert set(server.asked.values()) == {1}

    server.forget()
    without = [word for word in words if "real_toxicity.judge" not in word]
    do(marked, "sweep", *without, "judge=none", "benchmark.real_toxicity.judge=none")
    found = {sample["id"]: sample["raw"] for sample in samples_in(copy.parent)}
    assert {entry["id"]: found[entry["id"]] for entry in changed} == {entry["id"]: entry["raw"] for entry in changed}
    others = {name: raw for name, raw in found.items() if name not in {entry["id"] for entry in changed}}
    assert len(others) == LIMIT - len(lines)
    assert others == {name: samples[name]["raw"] for name in others}


def test_a_kill_while_texts_are_judged_asks_nothing_twice(
    server: JudgeServer, words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    server.behave = slowly
    sweep = start(tmp_path, *words, *by(server))
    wait_for(lambda: sum(server.answered.values()) >= 5)
    kill(sweep, tmp_path)
    journals = list((tmp_path / "outputs/judges").glob("*/*.jsonl"))
    kept = sum(len(journal_lines(path)) for path in journals)
    time.sleep(0.6)
    before = server.asked
    assert 3 <= kept < 2 * LIMIT, "it was killed in the middle"
    assert set(before.values()) == {1}
    assert 0 <= len(before) - kept <= CONCURRENCY, "what was under way is all that is lost"
    generated = texts(tmp_path)

    server.behave = truth
    do(tmp_path, "sweep", *words, *by(server))
    assert texts(tmp_path) == generated
    assert sum(count - 1 for count in server.asked.values()) == len(before) - kept
    assert rows(tmp_path) == rows(undisturbed)
    assert sum(len(journal_lines(path)) for path in (tmp_path / "outputs/judges").glob("*/*.jsonl")) == len(
        server.asked
    )
