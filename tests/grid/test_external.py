"""Adapters that were not trained here: as runs, named by what they are, never unpickled, found again from anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sweeping import expand, finish_evaluation, metric, plan, shipped

from peft_align import report
from peft_align.cli import ADAPTER, Asked, ask
from peft_align.config.command_line import parse
from peft_align.errors import InputError
from peft_align.grid.external import with_adapters
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run, Sweep
from peft_align.grid.serialize import config_of, run_from_plain, run_to_plain
from peft_align.plan import describe
from peft_align.store.sweeps import write_manifest
from peft_align.store.weights import ADAPTER_CONFIG as CONFIG
from peft_align.store.weights import ADAPTER_WEIGHTS as WEIGHTS

TINY = ("model=tiny", "dataset=everyday", "peft=lora")
MC = "evaluation.benchmarks=[everyday_mc]"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def make(folder: Path, weights: str = "weights", config: str = '{"peft_type": "LORA", "r": 8}') -> Path:
    """An adapter's folder."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(config, encoding="utf-8")
    header = json.dumps({"__metadata__": {"of": weights}}).encode()  # a file without a tensor
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def scored(adapter: Path | str, *words: str) -> Sweep:
    return with_adapters(expand(*TINY, MC, *words), [str(adapter)])


def external(adapter: Path | str, *words: str) -> Run:
    (run,) = [run for run in scored(adapter, *words).runs if run.kind == "external"]
    return run


def digits(run: Run) -> str:
    return run.id.rpartition("-")[2]


def refused(*adapters: Path | str, words: tuple[str, ...] = TINY) -> list[str]:
    with pytest.raises(InputError) as caught:
        with_adapters(expand(*words), [str(adapter) for adapter in adapters])
    return [str(fault) for fault in caught.value.faults]


# --- runs


def test_an_adapter_is_a_run_beside_the_baseline_and_nothing_is_trained(tmp_path: Path) -> None:
    sweep = scored(make(tmp_path / "mine"), "train.checkpoint_steps=[2,4]")
    run, baseline = sweep.runs
    assert (run.kind, baseline.kind, sweep.name) == ("external", "baseline", "external")
    assert run.id.startswith("external-mine-tiny-bf16-")
    assert run.adapter == str(tmp_path / "mine")
    assert run.parents == ()
    assert {scoring.steps for each in sweep.runs for scoring in each.scorings} == {(0,)}
    items = plan(sweep, tmp_path / "root")
    assert [item.why for item in items] == ["evaluate everyday_mc"] * 2
    assert items[0].requests[0].key is not None
    assert items[0].requests[0].key["adapter"] != items[1].requests[0].key["adapter"]


def test_its_id_is_that_of_its_content_wherever_it_lies(tmp_path: Path) -> None:
    run = external(make(tmp_path / "here/mine"))
    assert external(make(tmp_path / "there/mine")).id == run.id
    assert digits(external(make(tmp_path / "renamed"))) == digits(run)
    (tmp_path / "here/mine/README.md").write_text("A card.", encoding="utf-8")
    (tmp_path / "here/mine/training_args.bin").write_bytes(b"anything")
    assert external(tmp_path / "here/mine").id == run.id
    assert digits(external(make(tmp_path / "other/mine", weights="others"))) != digits(run)
    assert digits(external(make(tmp_path / "scaled/mine", config='{"peft_type": "LORA", "r": 16}'))) != digits(run)


@pytest.mark.parametrize(
    "word",
    [
        "dataset=beavertails",
        "preference=helpful",
        "method=dpo",
        "seed=3",
        "train.max_steps=7",
        "peft.r=16",
        "peft.alpha=3",
        "peft.dropout=0.5",
        "peft.adapter_dtype=bf16",
        "evaluation.limit=3",
        "evaluation.benchmarks=[mmlu]",
        "evaluation.base_precision=nf4",
        "judge=gpt4",
    ],
)
def test_its_id_follows_no_setting_that_it_was_not_made_with(tmp_path: Path, word: str) -> None:
    words = [given for given in (*TINY, MC) if given.partition("=")[0] != word.partition("=")[0]]
    adapter = make(tmp_path / "mine")
    (run,) = [run for run in with_adapters(expand(*words, word), [str(adapter)]).runs if run.kind == "external"]
    assert run.id == external(adapter).id


@pytest.mark.parametrize(
    "word", ["peft=qlora", "peft.compute_dtype=fp32", "model.shape.layers=3", "model=smollm2_135m"]
)
def test_its_id_follows_the_base_that_it_is_put_on(tmp_path: Path, word: str) -> None:
    words = [given for given in (*TINY, MC) if given.partition("=")[0] != word.partition("=")[0]]
    adapter = make(tmp_path / "mine")
    (run,) = [run for run in with_adapters(expand(*words, word), [str(adapter)]).runs if run.kind == "external"]
    assert digits(run) != digits(external(adapter))


def test_another_adapter_in_its_place_is_another_run_to_be_scored(tmp_path: Path) -> None:
    root, folder = tmp_path / "root", make(tmp_path / "mine")
    for item in plan(scored(folder), root):
        finish_evaluation(root, item.requests[0], [metric("acc", 0.5)])
    assert [item.done for item in plan(scored(folder), root)] == [True, True]
    shutil.rmtree(folder)
    make(folder, weights="others")
    assert [item.done for item in plan(scored(folder), root)] == [False, True]


def test_two_adapters_are_scored_in_one_sweep_with_one_baseline(tmp_path: Path) -> None:
    folders = [make(tmp_path / name, weights=name) for name in ("one", "two")]
    sweep = with_adapters(expand(*TINY, MC), list(map(str, folders)))
    assert [run.kind for run in sweep.runs] == ["external", "external", "baseline"]
    assert len({run.id for run in sweep.runs}) == 3
    assert [run.axes.get("adapter") for run in sweep.runs] == ["one", "two", None]


def test_an_adapter_that_was_trained_here_is_named_after_its_run(tmp_path: Path) -> None:
    run = external(make(tmp_path / "runs/everyday-harmless-sft-tiny-lora-s0-0123/adapter"))
    assert run.id.startswith("external-everyday-harmless-sft-tiny-lora-s0-0123-tiny-bf16-")


def test_it_is_judged_like_any_other(tmp_path: Path) -> None:
    sweep = with_adapters(
        expand(*TINY, "evaluation.benchmarks=[alpaca_eval]", "judge=gpt4"), [str(make(tmp_path / "mine"))]
    )
    for item in plan(sweep, tmp_path / "root"):
        assert [judgement.option for judgement in item.judgements] == ["gpt4"]


def test_it_survives_its_job_file_and_says_where_it_came_from(tmp_path: Path) -> None:
    run = external(make(tmp_path / "mine"))
    back = run_from_plain(json.loads(json.dumps(run_to_plain(run))))
    assert (back.id, back.kind, back.adapter, back.config) == (run.id, run.kind, run.adapter, run.config)
    assert config_of(run)["adapter"] == str(tmp_path / "mine")
    assert "train" not in config_of(run)


def test_plan_counts_it(tmp_path: Path) -> None:
    words = (*TINY, MC)
    sweep = scored(make(tmp_path / "mine"))
    content = describe(Asked(parse(words), sweep, Planner(tmp_path / "root", None)), plan(sweep, tmp_path / "root"))
    assert content["runs"] == sum(content["kinds"].values()) == 2
    assert "merge" not in content["axes"]


# --- what is refused


def test_a_pickled_adapter_is_refused_and_not_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "pickled")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch read'\ntR.")
    (fault,) = refused(folder)
    assert fault.startswith(f"adapter={folder}: has no adapter_model.safetensors")
    assert "pickled" in fault
    assert "safetensors" in fault.partition("pickled")[2]


def test_safetensors_beside_a_pickle_are_what_is_taken(tmp_path: Path) -> None:
    plain, both = make(tmp_path / "one/mine"), make(tmp_path / "two/mine")
    (both / "adapter_model.bin").write_bytes(b"anything")
    assert external(both).id == external(plain).id


def test_what_is_wrong_with_several_is_told_together(tmp_path: Path) -> None:
    no_config = make(tmp_path / "no_config")
    (no_config / CONFIG).unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    found = refused(no_config, empty, make(tmp_path / "fine"), "nobody/nothing")
    assert found[0].startswith(f"adapter={no_config}: has no adapter_config.json (")
    assert found[1].startswith(f"adapter={empty}: has no adapter_config.json and no adapter_model.safetensors (")
    assert found[2].startswith("adapter=nobody/nothing: is neither a folder, in the hub's cache nor reachable")
    assert len(found) == 3


@pytest.mark.parametrize("words", [["seed=0,1"], ["peft=lora,qlora"], ["+grid=quickstart"], ["+grid=merge", "seed=0"]])
def test_it_is_put_on_one_base_with_one_set_of_settings(tmp_path: Path, words: list[str]) -> None:
    given = tuple(words) if words[0].startswith("+") else ("model=tiny", *words)
    (fault,) = refused(make(tmp_path / "mine"), words=given)
    assert fault.startswith("adapter: is evaluated on one base with one set of settings")


# --- found again


def test_an_adapter_of_the_mirror_is_found_by_its_repository(tmp_path: Path) -> None:
    make(tmp_path / "mirror/me/my-adapter")
    run = external("me/my-adapter", f"hub.mirror={tmp_path / 'mirror'}")
    assert run.adapter == str(tmp_path / "mirror/me/my-adapter")
    assert run.id.startswith("external-my-adapter-tiny-bf16-")


def test_a_relative_path_is_remembered_in_full_and_a_repository_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "mine")
    line = parse(["adapter=mine,me/my-adapter", "model=tiny"], own=[ADAPTER])
    assert line.words == (f"adapter={tmp_path}/mine,me/my-adapter", "model=tiny")
    assert line.own[ADAPTER] == ("mine", "me/my-adapter")
    assert line.faults == ()


def test_report_finds_the_adapter_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("peft_align.cli.ConfigSpace", lambda *given: shipped())  # composed already
    root, elsewhere = tmp_path / "outputs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    make(tmp_path / "adapters/mine")
    monkeypatch.chdir(tmp_path)
    asked = ask([*TINY, MC, "adapter=adapters/mine"])
    for item in asked.plan():
        finish_evaluation(root, item.requests[0], [metric("acc", 0.25 if item.run.kind == "external" else 0.75)])
    write_manifest(root / asked.folder.relative_to("outputs"), asked.line.words, [], [r.id for r in asked.sweep.runs])
    monkeypatch.chdir(elsewhere)
    assert report.verb([f"root={root}"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("| mine"))
    assert "0.250" in line
    assert f"2 rows: {root / asked.folder.relative_to('outputs') / 'results.csv'}" in shown
    assert list(elsewhere.iterdir()) == []
