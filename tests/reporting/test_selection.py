"""The best values found by a search, and how another sweep takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_evaluation, finish_training, metric, plan, setting, shipped, trained

from peft_align.config.compose import read_yaml
from peft_align.errors import InputError
from peft_align.grid.language import load_selection
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run, Sweep
from peft_align.reporting.selection import Candidate, select, write_selection
from peft_align.store.records import digest_of, write_json

TINY = ("model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4", "evaluation.benchmarks=[preference]")
WORDS = (*TINY, "evaluation.heldout_split=validation")
Scores = Mapping[str, float]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are remembered in a folder of the test."""
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def search(*words: str) -> Sweep:
    """A search over what the words vary, on the validation split."""
    return expand(*WORDS, *words)


def finish(root: Path, sweep: Sweep, score: Callable[[Run], Scores]) -> None:
    """Have the search on disk, each run with the scores that it is given."""
    for run in trained(sweep):
        finish_training(root, run)
    for item in plan(sweep, root):
        scores = score(item.run) if item.run.kind == "train" else {"accuracy": 0.5}
        for request in item.requests:
            finish_evaluation(root, request, [metric(name, value) for name, value in scores.items()])


def chosen(root: Path, sweep: Sweep, *by: str) -> list[Candidate]:
    """What is selected, the choices alone."""
    return [c for c in select(sweep, plan(sweep, root), root, by or ("method",)) if c.chosen]


def refused(root: Path, sweep: Sweep, *by: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        select(sweep, plan(sweep, root), root, by or ("method",))
    return [str(fault) for fault in caught.value.faults]


def response_loss(values: Mapping[Any, float], *keys: str) -> Callable[[Run], Scores]:
    """Scores of SFT runs by the value of a key, or of several."""

    def score(run: Run) -> Scores:
        found = tuple(setting(run, key) for key in keys)
        return {"response_loss": values[found[0] if len(found) == 1 else found], "accuracy": 0.5}

    return score


def dpo_scores(values: Mapping[Any, tuple[float, float]], key: str) -> Callable[[Run], Scores]:
    return lambda run: dict(zip(("reward_accuracy", "dpo_loss"), values[setting(run, key)], strict=True))


# --- what is best


def test_sft_is_selected_by_the_loss_on_the_responses(tmp_path: Path) -> None:
    sweep = search("method=sft", "peft.r=8,16,32")
    finish(tmp_path, sweep, response_loss({8: 2.0, 16: 1.5, 32: 1.75}, "peft.r"))
    found = select(sweep, plan(sweep, tmp_path), tmp_path, ["method"])
    assert [(c.settings, c.scores, c.runs, c.chosen) for c in found] == [
        ({"peft.r": 16}, {"response_loss": 1.5}, 1, True),
        ({"peft.r": 32}, {"response_loss": 1.75}, 1, False),
        ({"peft.r": 8}, {"response_loss": 2.0}, 1, False),
    ]
    assert {c.group["method"] for c in found} == {"sft"}


def test_dpo_is_selected_by_reward_accuracy_and_between_equals_by_its_loss(tmp_path: Path) -> None:
    sweep = search("method=dpo", "method.beta=0.1,0.2,0.3,0.4")
    scores = {0.1: (0.5, 0.1), 0.2: (0.75, 0.9), 0.3: (0.75, 0.6), 0.4: (0.75, 0.7)}
    finish(tmp_path, sweep, dpo_scores(scores, "method.beta"))
    found = select(sweep, plan(sweep, tmp_path), tmp_path, ["method"])
    assert [c.settings["method.beta"] for c in found] == [0.3, 0.4, 0.2, 0.1]
    assert found[0].scores == {"reward_accuracy": 0.75, "dpo_loss": 0.6}


def test_the_mean_over_the_other_axes_decides(tmp_path: Path) -> None:
    sweep = search("method=sft", "peft.r=8,16", "seed=0,1", "preference=harmless,helpful")
    best_once = {(8, 0): 1.0, (8, 1): 4.0, (16, 0): 2.0, (16, 1): 2.0}
    finish(tmp_path, sweep, response_loss(best_once, "peft.r", "seed"))
    (best,) = chosen(tmp_path, sweep)
    assert (best.settings, best.scores, best.runs) == ({"peft.r": 16}, {"response_loss": 2.0}, 4)


def test_combinations_of_settings_compete(tmp_path: Path) -> None:
    sweep = search("method=sft", "peft.r=8,16", "peft.alpha=4,5")
    losses = {(8, 4.0): 3.0, (8, 5.0): 1.0, (16, 4.0): 2.0, (16, 5.0): 4.0}
    finish(tmp_path, sweep, response_loss(losses, "peft.r", "peft.alpha"))
    (best,) = chosen(tmp_path, sweep)
    assert best.settings == {"peft.r": 8, "peft.alpha": 5.0}


BY_PREFERENCE = {(8, "harmless"): 1.0, (16, "harmless"): 2.0, (8, "helpful"): 4.0, (16, "helpful"): 2.5}


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (["method"], [({"method": "sft"}, 16, 2)]),
        (["preference"], [({"preference": "harmless"}, 8, 1), ({"preference": "helpful"}, 16, 1)]),
        (
            ["method", "preference"],
            [({"method": "sft", "preference": "harmless"}, 8, 1), ({"method": "sft", "preference": "helpful"}, 16, 1)],
        ),
    ],
)
def test_each_value_of_what_is_selected_by_gets_its_own_choice(
    tmp_path: Path, by: list[str], expected: list[tuple[dict[str, str], int, int]]
) -> None:
    sweep = search("method=sft", "peft.r=8,16", "preference=harmless,helpful")
    finish(tmp_path, sweep, response_loss(BY_PREFERENCE, "peft.r", "preference"))
    assert [(c.group, c.settings["peft.r"], c.runs) for c in chosen(tmp_path, sweep, *by)] == expected


def test_a_setting_that_is_selected_by_does_not_compete(tmp_path: Path) -> None:
    sweep = search("method=sft", "peft.r=8,16", "peft.alpha=4,5")
    losses = {(8, 4.0): 3.0, (8, 5.0): 1.0, (16, 4.0): 2.0, (16, 5.0): 4.0}
    finish(tmp_path, sweep, response_loss(losses, "peft.r", "peft.alpha"))
    found = [(c.group, c.settings) for c in chosen(tmp_path, sweep, "peft.alpha")]
    assert found == [({"peft.alpha": 4.0}, {"peft.r": 16}), ({"peft.alpha": 5.0}, {"peft.r": 8})]


def test_only_the_last_checkpoint_counts(tmp_path: Path) -> None:
    sweep = search("method=sft", "peft.r=8,16", "train.checkpoint_steps=[2,4]")
    for run in trained(sweep):
        finish_training(tmp_path, run)
    for item in plan(sweep, tmp_path):
        for request in item.requests:
            better_early = {(8, 2): 0.1, (8, 4): 3.0, (16, 2): 5.0, (16, 4): 2.0}
            loss = better_early.get((item.run.config.peft.r, request.step), 0.0)
            finish_evaluation(tmp_path, request, [metric("response_loss", loss)])
    assert [c.settings["peft.r"] for c in chosen(tmp_path, sweep)] == [16]


def test_the_scores_are_those_that_this_search_asks_for(tmp_path: Path) -> None:
    few, many = (search("method=sft", "peft.r=8,16", f"evaluation.heldout={n}") for n in (8, 16))
    finish(tmp_path, few, response_loss({8: 1.0, 16: 2.0}, "peft.r"))
    for item in plan(many, tmp_path):
        loss = {8: 2.0, 16: 1.0}[item.run.config.peft.r]
        for request in item.requests:
            finish_evaluation(tmp_path, request, [metric("response_loss", loss)])
    assert [c.settings["peft.r"] for sweep in (few, many) for c in chosen(tmp_path, sweep)] == [8, 16]


def test_the_scores_of_an_earlier_adapter_do_not_count(tmp_path: Path) -> None:
    sweep = search("method=sft", "peft.r=8,16")
    for attempt in range(4):  # folders are named by a hash: one pair might be in order by chance
        for run in trained(sweep):
            directory = finish_training(tmp_path, run)
            record = directory.train_record() or {}
            record["checkpoints"]["4"]["digest"] = digest_of({f"{attempt}": {"sha256": run.id}})
            write_json(directory.path / "train.json", record)
        losses = {8: 1.0, 16: 2.0} if attempt % 2 else {8: 2.0, 16: 1.0}
        for item in plan(sweep, tmp_path):
            for request in item.requests:
                finish_evaluation(tmp_path, request, [metric("response_loss", losses.get(item.run.config.peft.r, 0.0))])
        assert [c.settings["peft.r"] for c in chosen(tmp_path, sweep)] == [8 if attempt % 2 else 16], attempt


@pytest.mark.parametrize("diverged", [8, 16])
def test_a_run_that_diverged_is_not_the_best(tmp_path: Path, diverged: int) -> None:
    sweep = search("method=sft", "peft.r=8,16")
    finish(tmp_path, sweep, response_loss({8: 1.0, 16: 1.0, diverged: math.nan}, "peft.r"))
    assert [c.settings["peft.r"] for c in chosen(tmp_path, sweep)] == [24 - diverged]


# --- what cannot be selected


def test_an_unfinished_search_is_told_with_how_much_is_missing(tmp_path: Path) -> None:
    sweep = search("method=sft", "peft.r=8,16")
    assert refused(tmp_path, sweep) == [
        "adhoc: 3 of its 3 runs are not done (finish it first: python -m peft_align.sweep with the same words)"
    ]
    finish_training(tmp_path, trained(sweep)[0])
    finish(tmp_path, search("method=sft", "peft.r=16"), response_loss({16: 1.0}, "peft.r"))
    (told,) = refused(tmp_path, sweep)
    assert told.startswith("adhoc: 1 of its 3 runs are not done")


def test_a_choice_by_the_test_split_is_refused(tmp_path: Path) -> None:
    sweep = expand(*TINY, "method=sft", "peft.r=8,16")
    finish(tmp_path, sweep, response_loss({8: 1.0, 16: 2.0}, "peft.r"))
    (told,) = refused(tmp_path, sweep)
    assert told.startswith("evaluation.heldout_split: a choice by the test split is no choice")


@pytest.mark.parametrize(
    ("words", "by", "told"),
    [
        (
            ["method=sft", "peft.r=8,16"],
            ["metod"],
            "select.by=metod: is no axis of this sweep (did you mean 'method'?)",
        ),
        (["method=sft", "peft.r=8,16"], ["peft.alpha"], "select.by=peft.alpha: is no axis of this sweep"),
        (["method=sft", "seed=0,1"], ["method"], "select.by: nothing is left to select: besides method"),
        (["method=sft", "peft.r=8,16"], ["peft.r"], "select.by: nothing is left to select: besides peft.r"),
        (
            ["method=sft,dpo", "peft.r=8,16"],
            ["model"],
            "select.by: methods are measured differently (dpo by reward_accuracy; sft by response_loss)",
        ),
        (["method=sft", "peft.r=8,16", "evaluation.benchmarks=[everyday_mc]"], ["method"], "does not have preference"),
    ],
)
def test_what_is_refused(tmp_path: Path, words: Sequence[str], by: list[str], told: str) -> None:
    words = [*[word for word in WORDS if word.partition("=")[0] not in "".join(words)], *words]
    (fault,) = refused(tmp_path, expand(*words), *by)
    assert told in fault


def test_candidates_that_were_tried_on_other_cells_are_not_compared(tmp_path: Path) -> None:
    sweep = search("method=sft", "peft.r=8,16", "seed=0,1")
    sweep.runs.remove(trained(sweep)[-1])  # as by an exclude, or a zip
    finish(tmp_path, sweep, response_loss({8: 1.0, 16: 2.0}, "peft.r"))
    (told,) = refused(tmp_path, sweep)
    assert "the candidates were not tried on the same cells (they have 1, 2 runs)" in told
    assert "seed" in told.partition("(narrow")[2]


# --- the file


def searched(root: Path) -> Sweep:
    """A finished search of both methods: SFT is best with rank 16, DPO with rank 8."""
    sweep = search("method=sft,dpo", "peft.r=8,16", "train.learning_rate=1e-5,3e-4")
    best = {("sft", 16, 1e-5), ("dpo", 8, 3e-4)}

    def score(run: Run) -> Scores:
        good = (run.config.method.kind, run.config.peft.r, run.config.train.learning_rate) in best
        return {"response_loss": 1.0 - good, "reward_accuracy": 0.5 + 0.25 * good, "dpo_loss": 0.7}

    finish(root, sweep, score)
    return sweep


def written(root: Path, path: Path, by: Sequence[str] = ("method",)) -> Path:
    sweep = searched(root)
    write_selection(path, select(sweep, plan(sweep, root), root, by), ["+grid=mine", "select.by=[method]"])
    return path


def test_the_file_says_what_was_chosen_from_what(tmp_path: Path) -> None:
    content = read_yaml(written(tmp_path, tmp_path / "new" / "best.yaml"))
    assert content["selected_by"] == "+grid=mine select.by=[method]"
    assert content["when"] == [
        {"where": {"method": "sft"}, "set": {"peft.r": 16, "train.learning_rate": 1e-5}},
        {"where": {"method": "dpo"}, "set": {"peft.r": 8, "train.learning_rate": 3e-4}},
    ]
    assert len(content["table"]) == 8
    first = {"method": "sft", "peft.r": 16, "train.learning_rate": 1e-5, "response_loss": 0.0}
    assert content["table"][0] == {**first, "runs": 1, "chosen": True}
    assert [row["chosen"] for row in content["table"]] == [True, False, False, False] * 2


def test_the_file_is_read_back_and_changes_exactly_the_runs_it_is_for(tmp_path: Path) -> None:
    path = written(tmp_path, tmp_path / "best.yaml")
    whens = load_selection(shipped(), path)
    assert [(when.where, when.settings, when.axes) for when in whens] == [
        ({"method": ["sft"]}, {"peft.r": 16, "train.learning_rate": 1e-5}, {}),
        ({"method": ["dpo"]}, {"peft.r": 8, "train.learning_rate": 3e-4}, {}),
    ]
    keys = ("method", "peft.r", "train.learning_rate", "peft.alpha")
    sweep = expand("method=sft,dpo", "model=tiny", "seed=0,1", f"+selected={path}")
    found = [tuple(setting(run, key) for key in keys) for run in trained(sweep)]
    assert found == [("sft", 16, 1e-5, 16.0)] * 2 + [("dpo", 8, 3e-4, 32.0)] * 2


def test_a_choice_by_more_axes_leaves_other_runs_as_they_are(tmp_path: Path) -> None:
    path = written(tmp_path, tmp_path / "best.yaml", by=("method", "model"))
    words = ("method=sft,dpo", "model=tiny,mistral_7b")
    plain, selected = (trained(expand(*words, *more)) for more in ((), (f"+selected={path}",)))
    changed = [
        (run.choices["method"], run.choices["model"])
        for before, run in zip(plain, selected, strict=True)
        if before.id != run.id
    ]
    assert changed == [("sft", "tiny"), ("dpo", "tiny")]


def test_the_runs_that_were_best_are_those_that_are_selected(tmp_path: Path) -> None:
    path = written(tmp_path, tmp_path / "best.yaml")
    sweep = expand(*WORDS, "method=sft,dpo", f"+selected={path}")
    assert [item.done for item in Planner(tmp_path, None).plan(sweep.runs)] == [True] * 3


def test_the_file_is_written_whole_and_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, tmp_path / "out" / "best.yaml")
    before = path.read_bytes()
    assert written(tmp_path, path).read_bytes() == before
    monkeypatch.setattr("peft_align.reporting.selection.OmegaConf.to_yaml", broken)
    with pytest.raises(OSError, match="disk"):
        written(tmp_path, path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["best.yaml"]


def broken(*_: object) -> str:
    raise OSError("the disk is full")


def test_a_setting_that_one_method_lacks_is_not_selected_for_it(tmp_path: Path) -> None:
    sweep = search("method=sft,dpo", "method.beta=0.1,0.2", "peft.r=8,16")
    finish(tmp_path, sweep, lambda run: {"response_loss": 1.0, "reward_accuracy": 0.5, "dpo_loss": 0.7})
    path = tmp_path / "best.yaml"
    write_selection(path, select(sweep, plan(sweep, tmp_path), tmp_path, ["method"]), [])
    assert [set(when.settings) for when in load_selection(shipped(), path)] == [{"peft.r"}, {"peft.r", "method.beta"}]


def test_a_file_with_a_changed_byte_is_refused_and_one_that_was_edited_is_not(tmp_path: Path) -> None:
    path = written(tmp_path, tmp_path / "best.yaml")
    whole = path.read_bytes()
    at = whole.index(b"peft.r: ") + len(b"peft.r: ")
    damaged = bytearray(whole)
    damaged[at] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError) as caught:
        load_selection(shipped(), path)
    (fault,) = caught.value.faults
    assert fault.what == "is not as it was written"
    assert "delete its last line" in fault.remedy
    path.write_bytes(b"\n".join(bytes(damaged).splitlines()[:-1]) + b"\n")
    assert load_selection(shipped(), path) != ()
    path.write_bytes(whole)
    assert load_selection(shipped(), path) != ()
