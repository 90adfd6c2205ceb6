"""What a worker evaluates, on the tiny model: one base for many adapters, another base, adapters from elsewhere."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, Reply
from sweeping import expand, plan, write_option

from peft_align.config.compose import ConfigSpace
from peft_align.evaluation import endpoint
from peft_align.grid.external import with_adapters
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run, Sweep
from peft_align.launch.job import Worker
from peft_align.reporting.table import markdown, rows
from peft_align.store.runs import RunDir

pytestmark = pytest.mark.usefixtures("small_lm_eval")

Verb = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = (
    "model=tiny", "dataset=everyday", "method=sft", "train.max_steps=2", "train.batch_size=2", "train.max_length=200",
    "train.learning_rate=1e-2", "evaluation.heldout=4", "evaluation.limit=3",
)  # fmt: skip
TWO = "evaluation.benchmarks=[preference,everyday_mc]"
Found = dict[str, tuple[list[dict[str, Any]], bytes]]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the form of Red-Instruct's."""
    folder = tmp_path_factory.mktemp("red_instruct")
    (folder / "red_prompts").mkdir()
    (folder / "red_prompts/standard.txt").write_text("<question>", encoding="utf-8")
    (folder / "dangerousqa.json").write_text(json.dumps([f"Question {i}?" for i in range(3)]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def words(questions: Path) -> tuple[str, ...]:
    """Two runs and their baseline, scored in every way that a worker scores."""
    return (
        *SMALL, "peft=lora", "seed=0,1",
        "evaluation.benchmarks=[divergence,preference,red_instruct_standard,everyday_mc]",
        f"benchmark.red_instruct_standard.folder={questions}", "benchmark.red_instruct_standard.max_new_tokens=6",
        "benchmark.divergence.prompts=2", "benchmark.divergence.max_new_tokens=6",
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(small_lm_eval: None, words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root where both are trained, and nothing is evaluated."""
    root = tmp_path_factory.mktemp("made")
    assert Worker(root, "test", ("train",)).work(expand(*words).runs)
    return root


@pytest.fixture(scope="module")
def together(made: Path, words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root with all of it evaluated by one worker, the baseline between the adapters."""
    root = tmp_path_factory.mktemp("together") / "root"
    shutil.copytree(made, root)
    one, other, baseline = expand(*words).runs
    worker = Worker(root, "test")
    assert worker.work([one, baseline, other])
    assert worker._bases is not None
    assert worker._bases.loads == 1
    return root


def found(root: Path, run: Run) -> Found:
    """Metrics and samples of each benchmark of a run."""
    item = Planner(root, None).item(run)
    assert item.done, item.why
    result = {}
    for request in item.requests:
        record = RunDir(root, run.id).evaluation_record(request.name) or {}
        samples = gzip.decompress((RunDir(root, run.id).evaluation(request.name) / "samples.jsonl.gz").read_bytes())
        result[request.benchmark] = (record["metrics"], samples)
    return result


def test_a_base_is_loaded_once_for_all_adapters_and_scores_are_those_of_a_process_each(
    made: Path, together: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    apart = tmp_path / "apart"
    shutil.copytree(made, apart)
    runs = expand(*words).runs
    for run in reversed(runs):
        assert Worker(apart, "test").work([run])
    assert [run.kind for run in runs] == ["train", "train", "baseline"]
    for run in runs:
        ours, theirs = found(together, run), found(apart, run)
        assert set(ours) == {"divergence", "preference", "red_instruct_standard", "everyday_mc"}
        for benchmark in ours:
            assert ours[benchmark] == theirs[benchmark], (run.kind, benchmark)
    for benchmark in ("preference", "everyday_mc"):  # they are three models: the comparison can fail
        assert len({found(together, run)[benchmark][1] for run in runs}) == 3


def test_an_adapter_from_here_scores_the_same_as_one_from_elsewhere(
    together: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    run = expand(*words).runs[0]
    adapter = tmp_path / "elsewhere/mine"
    shutil.copytree(RunDir(together, run.id).adapter, adapter)
    given = [word for word in words if not word.startswith(("seed", "evaluation.benchmarks", "benchmark."))]
    given += ["evaluation.benchmarks=[preference,everyday_mc,divergence]"]
    given += [word for word in words if word.startswith("benchmark.divergence")]
    sweep = with_adapters(expand(*given), [str(adapter)])
    root = tmp_path / "root"
    worker = Worker(root, "test")
    assert worker.work(sweep.runs)
    assert worker._bases is not None
    assert worker._bases.loads == 1
    external, baseline = sweep.runs
    assert external.kind == "external"
    ours, theirs = found(root, external), found(together, run)
    assert set(ours) == {"preference", "everyday_mc", "divergence"}
    for benchmark in ours:
        assert ours[benchmark] == theirs[benchmark], benchmark
        assert ours[benchmark][1] != found(root, baseline)[benchmark][1], benchmark
    record = json.loads((RunDir(root, external.id).path / "run.json").read_text(encoding="utf-8"))
    assert (record["kind"], record["config"]["adapter"]) == ("external", str(adapter))
    shown = {(row["kind"], row["method"], row["peft"], row["base"]) for row in table(sweep, root)}
    assert shown == {("external", "mine", "bf16", "bf16"), ("baseline", None, "bf16", "bf16")}


def table(sweep: Sweep, root: Path) -> list[dict[str, Any]]:
    return rows(sweep, plan(sweep, root), root)


def test_a_quantized_run_is_scored_on_its_own_base_and_on_another(tmp_path: Path) -> None:
    text = "blocks: [{name: own}, {name: plain, set: {evaluation.base_precision: bf16}}]"
    write_option(tmp_path, "grid/two", text)
    sweep = expand("+grid=two", *SMALL, "peft=qlora", TWO, space=ConfigSpace([tmp_path]))
    run, *baselines = sweep.runs
    assert [baseline.base for baseline in baselines] == ["nf4", "bf16"]
    root = tmp_path / "root"
    worker = Worker(root, "test")
    assert worker.work(sweep.runs)
    assert all(item.done for item in plan(sweep, root))
    shown = table(sweep, root)
    losses = {
        (row["kind"], row["base"]): row["value"]
        for row in shown
        if (row["benchmark"], row["metric"]) == ("preference", "response_loss")
    }
    assert set(losses) == {("train", "nf4"), ("train", "bf16"), ("baseline", "nf4"), ("baseline", "bf16")}
    assert len(set(losses.values())) == 4
    margins = {row["base"]: row["value"] for row in shown if row["metric"] == "reward_margin"}
    assert set(margins) == {"nf4", "bf16"}  # each against the base that it was scored on
    samples = {base.base: found(root, base)["preference"][1].splitlines() for base in baselines}
    for request in plan(sweep, root)[0].requests:
        if request.benchmark == "preference":
            lines = gzip.decompress((RunDir(root, run.id).evaluation(request.name) / "samples.jsonl.gz").read_bytes())
            base = samples[request.scoring.base.base_precision]
            for ours, theirs in zip(map(json.loads, lines.splitlines()), map(json.loads, base), strict=True):
                margin = (ours["chosen_logp"] - theirs["chosen_logp"]) - (
                    ours["rejected_logp"] - theirs["rejected_logp"]
                )
                assert ours["reward_margin"] == pytest.approx(margin, abs=1e-6)
    head = next(line for line in markdown(sweep, shown).splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in head.split("|")][1:4] == ["method", "peft", "base"]


def test_a_key_in_the_environment_is_sent_and_written_nowhere(
    together: Path, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-a-secret-that-is-nowhere"
    monkeypatch.setenv("MY_JUDGES_KEY", secret)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.002)
    root = tmp_path / "root"
    shutil.copytree(together, root)
    with JudgeServer(lambda request: Reply("[[A]]")) as server:
        judge = ("judge=endpoint", f"judge.base_url={server.url}", "judge.api_key_env=MY_JUDGES_KEY", "judge.retries=0")
        runs = expand(*words, *judge).runs
        assert Worker(root, "test", ("judge",)).work(runs)
        assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {secret}"}
        server.behave = lambda request: Reply(status=401, body=f"the key {secret} is wrong".encode())
        other = expand(*words, *judge, "judge.model=other").runs
        assert not Worker(root, "test", ("judge",)).work(other)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {"run.json", "failed.json"} <= {path.name for path in files}
    assert "MY_JUDGES_KEY" in (RunDir(root, runs[0].id).path / "run.json").read_text(encoding="utf-8")
    for path in files:
        content = path.read_bytes()
        assert secret.encode() not in (gzip.decompress(content) if path.suffix == ".gz" else content), path


@pytest.mark.slow
def test_the_program_scores_two_adapters_and_report_finds_them_from_another_folder(
    verb: Verb, made: Path, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, run in enumerate(expand(*words).runs[:2]):
        shutil.copytree(RunDir(made, run.id).adapter, tmp_path / f"adapters/mine_{i}")
    given = [word for word in SMALL if not word.startswith("train.max_steps")]
    given += ["peft=lora", TWO, "adapter=adapters/mine_0,adapters/mine_1", "launcher.threads=1"]
    done = verb("evaluate", *given, check=True)
    assert "external: 3 runs to evaluate, 0 not made yet" in done.stdout
    assert "external: 0 runs to evaluate, 0 not made yet" in verb("evaluate", *given, check=True).stdout
    (path,) = (tmp_path / "outputs/sweeps").glob("external-*/results.csv")
    with path.open(newline="", encoding="utf-8") as file:
        shown = list(csv.DictReader(file))
    assert {row["method"] for row in shown} == {"mine_0", "mine_1", ""}
    path.unlink()
    (tmp_path / "moved").mkdir()
    monkeypatch.chdir(tmp_path / "moved")
    from peft_align import report

    assert report.verb([f"root={tmp_path / 'outputs'}"]) == 0
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == shown
