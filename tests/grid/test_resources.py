"""What a stage of a run asks a cluster for: rules by stage, kind and option, the options of sbatch, time limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeping import expand, faults, trained, write_option

from peft_align.config.compose import ConfigSpace
from peft_align.config.launchers import Allocation, ResourceRule, Resources
from peft_align.config.validate import leaves
from peft_align.errors import InputError
from peft_align.grid.resources import allocation, directives, seconds_of
from peft_align.grid.runs import Run

WORDS = ("model=tiny", "dataset=everyday", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]")
MERGES = """
blocks:
  - name: pair
    kind: merge
    axes: {merge: [linear]}
    inputs: [[{preference: harmless}, {preference: helpful}]]
    set: {model: tiny, dataset: everyday, peft: lora, train.max_steps: 4}
"""


def rule(where: dict[str, str], **asked: Any) -> ResourceRule:
    return ResourceRule(where, Allocation(**asked))


def resources(*rules: ResourceRule, **asked: Any) -> Resources:
    return Resources(**asked, rules=list(rules))


def run_of(*words: str) -> Run:
    return trained(expand(*WORDS, *words))[0]


# --- rules


def test_without_rules_every_stage_asks_for_the_same() -> None:
    asked = resources(gpus=1, time="04:00:00")
    for stage in ("train", "merge", "evaluate", "judge"):
        assert allocation(asked, stage, run_of()) == Allocation(gpus=1, time="04:00:00")
    assert allocation(asked, "report") == Allocation(gpus=1, time="04:00:00")


def test_of_several_rules_that_fit_the_later_wins_setting_by_setting() -> None:
    asked = resources(
        rule({"stage": "train"}, gpus=2, time="10:00:00"),
        rule({"method": "dpo"}, gpus=4),
        rule({"method": "sft"}, gpus=8),
        rule({"model": "tiny"}, mem="2G"),
        gpus=1,
        cpus=6,
    )
    assert allocation(asked, "train", run_of("method=dpo")) == Allocation(gpus=4, cpus=6, time="10:00:00", mem="2G")
    assert allocation(asked, "evaluate", run_of("method=dpo")) == Allocation(gpus=4, cpus=6, mem="2G")
    assert allocation(asked, "report") == Allocation(gpus=1, cpus=6)


def test_a_rule_may_take_the_gpus_away_and_what_it_leaves_out_stays() -> None:
    asked = resources(rule({"stage": "judge"}, gpus=0), gpus=1, time="60")
    assert allocation(asked, "judge", run_of()) == Allocation(gpus=0, time="60")
    assert directives(allocation(asked, "judge", run_of())) == ["--time=60"]


def test_a_rule_that_says_the_gpus_in_one_word_says_all_of_them() -> None:
    run = run_of(*WORDS)
    asked = resources(rule({"stage": "train"}, gpus=4), gres="gpu:a100:1")
    assert directives(allocation(asked, "train", run)) == ["--gpus-per-node=4"]
    assert directives(allocation(asked, "evaluate", run)) == ["--gres=gpu:a100:1"]
    asked = resources(rule({"stage": "train"}, gres="gpu:h200:1"), gpus=4)
    assert (allocation(asked, "train", run).gpus, allocation(asked, "evaluate", run).gpus) == (None, 4)
    assert directives(allocation(asked, "train", run)) == ["--gres=gpu:h200:1"]


def test_a_rule_takes_an_option_away_with_an_empty_text() -> None:
    asked = resources(rule({"stage": "judge"}, qos="", constraint=""), qos="long", constraint="a100")
    assert directives(allocation(asked, "judge")) == []
    assert directives(allocation(asked, "report")) == ["--qos=long", "--constraint=a100"]


def test_a_list_of_a_rule_takes_the_place_of_the_list_before() -> None:
    asked = resources(rule({"stage": "judge"}, setup=["b"], extra=["--nice"]), setup=["a"], extra=["--exclude=n1"])
    assert allocation(asked, "judge", run_of()) == Allocation(setup=["b"], extra=["--nice"])
    assert allocation(asked, "train", run_of()) == Allocation(setup=["a"], extra=["--exclude=n1"])


@pytest.mark.parametrize(
    ("where", "fits", "not_that"),
    [
        ({"dataset": "everyday"}, "dataset=everyday", "dataset=beavertails"),
        ({"preference": "helpful"}, "preference=helpful", "preference=harmless"),
        ({"method": "dpo"}, "method=dpo", "method=sft"),
        ({"model": "tiny"}, "model=tiny", "model=mistral_7b"),
        ({"peft": "qlora"}, "peft=qlora", "peft=lora"),
        ({"kind": "train", "method": "dpo"}, "method=dpo", "method=sft"),
    ],
    ids=lambda given: "+".join(given) if isinstance(given, dict) else given,
)
def test_a_rule_holds_for_runs_with_its_options_and_for_no_others(
    where: dict[str, str], fits: str, not_that: str
) -> None:
    asked = resources(rule(where, gpus=7), gpus=1)
    others = [word for word in WORDS if word.partition("=")[0] != fits.partition("=")[0]]
    for word, gpus in ((fits, 7), (not_that, 1)):
        run = trained(expand(*others, word))[0]
        assert allocation(asked, "train", run).gpus == gpus, word


def test_a_rule_with_several_conditions_holds_only_where_all_do() -> None:
    asked = resources(rule({"stage": "train", "method": "dpo"}, gpus=7))
    assert allocation(asked, "train", run_of("method=dpo")).gpus == 7
    assert allocation(asked, "evaluate", run_of("method=dpo")).gpus is None
    assert allocation(asked, "train", run_of("method=sft")).gpus is None


def test_a_rule_for_a_kind_holds_for_baselines_or_merges_alone(tmp_path: Path) -> None:
    write_option(tmp_path, "grid/mine", MERGES)
    runs = expand("+grid=mine", space=ConfigSpace([tmp_path])).runs
    assert {run.kind for run in runs} == {"train", "merge", "baseline"}
    asked = resources(rule({"kind": "baseline"}, gpus=1), rule({"kind": "merge"}, gpus=2))
    found = {run.kind: allocation(asked, "evaluate", run) for run in runs}
    assert found == {"train": Allocation(), "baseline": Allocation(gpus=1), "merge": Allocation(gpus=2)}


def test_a_rule_for_a_way_of_merging_holds_for_merges_alone(tmp_path: Path) -> None:
    write_option(tmp_path, "grid/mine", MERGES)
    runs = expand("+grid=mine", space=ConfigSpace([tmp_path])).runs
    asked = resources(rule({"merge": "linear"}, cpus=3))
    assert [run.kind for run in runs if allocation(asked, "evaluate", run).cpus == 3] == ["merge"]


def test_a_rule_for_a_judge_holds_where_it_judges_and_not_where_texts_are_made() -> None:
    asked = resources(rule({"judge": "gpt4"}, gpus=0, partition="login"), gpus=1)
    run = run_of("judge=gpt4")
    assert allocation(asked, "judge", run, "gpt4") == Allocation(gpus=0, partition="login")
    assert allocation(asked, "judge", run, "profanity") == Allocation(gpus=1)
    assert allocation(asked, "evaluate", run) == Allocation(gpus=1)
    assert allocation(asked, "train", run) == Allocation(gpus=1)


def test_a_rule_for_a_method_does_not_hold_for_a_baseline_which_has_none() -> None:
    asked = resources(rule({"method": "dpo"}, gpus=4), rule({"preference": "helpful"}, cpus=4))
    for words in (("method=dpo", "preference=helpful"), ("method=sft", "preference=harmless")):
        (baseline,) = (run for run in expand(*WORDS, *words).runs if run.kind == "baseline")
        assert allocation(asked, "evaluate", baseline) == Allocation()


def test_a_rule_for_a_model_holds_for_its_baseline() -> None:
    asked = resources(rule({"model": "tiny"}, gpus=4))
    (baseline,) = (run for run in expand(*WORDS).runs if run.kind == "baseline")
    assert allocation(asked, "evaluate", baseline).gpus == 4


def test_rules_are_read_from_the_command_line_and_from_a_file_of_the_users(tmp_path: Path) -> None:
    word = "resources.rules=[{where:{stage:judge},set:{gpus:0,time:'01:00:00'}}]"
    expected = [rule({"stage": "judge"}, gpus=0, time="01:00:00")]
    assert expand(*WORDS, word).config.resources.rules == expected
    text = 'defaults: [default]\ngpus: 1\nrules: [{where: {stage: judge}, set: {gpus: 0, time: "01:00:00"}}]\n'
    write_option(tmp_path, "resources/mine", text)
    found = expand(*WORDS, "resources=mine", space=ConfigSpace([tmp_path])).config.resources
    assert (found.gpus, found.rules, found.partition) == (1, expected, None)


@pytest.mark.parametrize(
    ("written", "seconds"), [("12:30:00", 45000), ("30:00", 1800), ("04:00:00", 14400), ("90", 5400), ("1-12", 129600)]
)
def test_a_time_limit_that_a_file_gives_without_quotes_is_taken_as_it_is_written_or_refused(
    tmp_path: Path, written: str, seconds: int
) -> None:
    """YAML 1.1 reads 12:30:00 as the number 45000, which Slurm would take for minutes: a month."""
    write_option(tmp_path, "resources/mine", f"defaults: [default]\ntime: {written}\n")
    space, told = ConfigSpace([tmp_path]), ""
    try:
        limit = expand(*WORDS, "resources=mine", space=space).config.resources.time
    except InputError as error:
        limit, told = None, str(error)
    if limit is None:
        assert "resources.time" in told
        assert "quotes" in told
    else:
        assert seconds_of(limit) == seconds, limit


def test_what_is_asked_of_a_cluster_makes_no_other_run() -> None:
    asked = ("resources.gpus=2", "resources.time='1-0'", "launcher=slurm", "launcher.runs_per_task=4")
    assert [run.id for run in expand(*WORDS).runs] == [run.id for run in expand(*WORDS, *asked).runs]
    keys = [leaf for key, leaf in leaves().items() if key.startswith(("resources.", "launcher."))]
    assert keys
    assert not any(leaf.scientific for leaf in keys)


# --- options of sbatch

FLAGS = {
    "partition": ("gpu", "--partition=gpu"),
    "account": ("me", "--account=me"),
    "qos": ("long", "--qos=long"),
    "constraint": ("a100&ib", "--constraint=a100&ib"),
    "reservation": ("mine", "--reservation=mine"),
    "gpus": (2, "--gpus-per-node=2"),
    "gres": ("gpu:a100:1", "--gres=gpu:a100:1"),
    "cpus": (8, "--cpus-per-task=8"),
    "mem": ("32G", "--mem=32G"),
    "time": ("1-12", "--time=1-12"),
}


def test_the_shipped_resources_ask_for_nothing() -> None:
    asked = expand(*WORDS, "launcher=slurm").config.resources
    assert asked == Resources()
    assert directives(allocation(asked, "train", run_of())) == []


@pytest.mark.parametrize("name", FLAGS)
def test_an_option_is_given_to_sbatch_if_it_is_asked_for_and_alone(name: str) -> None:
    value, flag = FLAGS[name]
    assert directives(Allocation(**{name: value})) == [flag]


def test_gpus_in_the_clusters_own_words_take_the_place_of_their_number() -> None:
    assert directives(Allocation(gpus=2, gres="gpu:a100:2")) == ["--gres=gpu:a100:2"]


def test_no_gpus_are_no_option() -> None:
    assert directives(Allocation(gpus=0)) == []


def test_further_options_come_last_so_that_they_win() -> None:
    asked = Allocation(time="60", extra=["--exclude=n3", "--time=30"])
    assert directives(asked) == ["--time=60", "--exclude=n3", "--time=30"]


def test_what_is_done_inside_of_the_job_is_no_option_of_sbatch() -> None:
    assert directives(Allocation(setup=["module load cuda"], prefix="apptainer exec my.sif", python="/p/python")) == []


# --- time limits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("0", 0),
        ("30:15", 30 * 60 + 15),
        ("12:30:00", 12 * 3600 + 30 * 60),
        ("100:00:00", 100 * 3600),
        ("2-12", 2 * 86400 + 12 * 3600),
        ("2-12:30", 2 * 86400 + 12 * 3600 + 30 * 60),
        ("2-12:30:15", 2 * 86400 + 12 * 3600 + 30 * 60 + 15),
        ("0-00:10", 600),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
    ],
)
def test_a_time_limit_is_read_in_all_of_slurms_forms(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "1-", "-1", "1:2:3:4", "1-2:3:4:5", "1.5", "4 hours", ":30", "30:", "a-1"])
def test_what_is_no_time_limit_is_none(text: str) -> None:
    assert seconds_of(text) is None


@given(st.integers(0, 60), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_the_forms_of_one_time_limit_are_the_same_seconds(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert seconds_of(f"{days}-{hours:02d}:{minutes:02d}:{seconds:02d}") == total
    assert seconds_of(f"{days * 24 + hours}:{minutes:02d}:{seconds:02d}") == total
    assert seconds_of(f"{(days * 24 + hours) * 60 + minutes}:{seconds:02d}") == total
    assert seconds_of(f"{days}-{hours}:{minutes}") == total - seconds
    assert seconds_of(f"{days}-{hours}") == total - seconds - 60 * minutes
    assert seconds_of(str((days * 24 + hours) * 60 + minutes)) == total - seconds


# --- what is wrong with them


def test_everything_that_is_wrong_with_the_rules_is_told_at_once_with_what_was_meant() -> None:
    rules = (
        "resources.rules=[{where:{stag:train},set:{gpus:1}},{where:{stage:evalute},set:{gpus:1}},"
        "{where:{kind:baselin},set:{gpus:1}},{where:{model:tinny},set:{time:'4h'}},{where:{judge:gpt5},set:{gpus:0}},"
        "{where:{method:dpp},set:{extra:['exclude=n3']}}]"
    )
    found = faults(*WORDS, rules, "resources.time='1:2:3:4'")
    expected = [
        ("resources.rules[0].where.stag: is nothing that a rule can ask for", "did you mean 'stage'?"),
        ("resources.rules[1].where.stage: there is no stage 'evalute'", "did you mean 'evaluate'?"),
        ("resources.rules[2].where.kind: there is no kind 'baselin'", "did you mean 'baseline'?"),
        ("resources.rules[3].where.model: there is no model 'tinny'", "did you mean 'tiny'?"),
        ("resources.rules[3].set.time: '4h' is no time limit", "D-H"),
        ("resources.rules[4].where.judge: there is no judge 'gpt5'", "did you mean 'gpt4'?"),
        ("resources.rules[5].where.method: there is no method 'dpp'", "did you mean 'dpo'?"),
        ("resources.rules[5].set.extra: 'exclude=n3' is no option of sbatch", "--exclude=n3"),
        ("resources.time: '1:2:3:4' is no time limit", "D-H"),
    ]
    for start, hint in expected:
        assert any(each.startswith(start) and hint in each for each in found), (start, found)
    assert len(found) == len(expected), found


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("resources.rules=[{where:{stage:judge},set:{gpu:0}}]", "did you mean 'gpus'?"),
        ("resources.rules=[{where:{stage:judge},st:{gpus:0}}]", "did you mean 'set'?"),
        ("resources.rules=[{where:{stage:judge}}]", "is missing"),
        ("resources.partion=gpu", "did you mean 'resources.partition'?"),
        ("resources.gpus=-1", "out of range"),
        ("resources.gpus=one", "is not a whole number"),
        ("resources.setup=module", "a list of at least one value is expected"),
        ("resources.gpus=1,2", "holds for a sweep as a whole"),
        ("resources=defualt", "did you mean 'default'?"),
    ],
)
def test_a_setting_that_there_is_not_is_told_with_the_one_that_was_meant(word: str, told: str) -> None:
    found = faults(*WORDS, word)
    assert any(told in each for each in found), found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resources.gres=gpu:a100:4"], "gpu:a100:4 is 4 GPUs, and gpus, the processes that train a run, is 1"),
        (
            ["resources.gres=gpu:2", "resources.gpus=4"],
            "gpu:2 is 2 GPUs, and gpus, the processes that train a run, is 4",
        ),
        (["resources.extra=['--array=0-3']"], "--array is the launcher's own"),
        (["resources.extra=['-M other']"], "-M is the launcher's own"),
        (["launcher=slurm", "resources.time='00:02:00'"], "leaves no time before launcher.signal_before=120"),
        (["launcher=slurm", "resources.time='30'", "launcher.signal_before=1800"], "30 leaves no time before"),
    ],
)
def test_what_slurm_would_take_and_no_run_could_live_with_is_refused(words: list[str], told: str) -> None:
    found = faults(*WORDS, *words)
    assert any(told in each for each in found), found


@pytest.mark.parametrize(
    "words",
    [
        ["resources.gres=gpu:a100:4", "resources.gpus=4"],
        ["resources.gres=gpu:a100"],
        ["resources.gres='craynetwork:1,gpu:1'"],
        ["resources.gres=gpu:4", "resources.gpus=0"],
        ["launcher=slurm", "resources.time='00:10:00'"],
        ["launcher=slurm", "resources.time=UNLIMITED"],
        ["resources.time='00:01:00'"],
    ],
)
def test_what_agrees_is_taken(words: list[str]) -> None:
    assert expand(*WORDS, *words).runs


@pytest.mark.parametrize(
    "where",
    ["stage:report", "kind:external", "stage:merge", "merge:ties", "judge:none", "peft:lora", "dataset:everyday"],
)
def test_a_rule_for_what_there_is_is_taken(where: str) -> None:
    assert expand(*WORDS, f"resources.rules=[{{where:{{{where}}},set:{{gpus:0}}}}]").config.resources.rules


def test_a_rule_may_name_an_option_of_the_users_own(tmp_path: Path) -> None:
    write_option(tmp_path, "model/mine", "defaults: [tiny]\n")
    word = "resources.rules=[{where:{model:mine},set:{gpus:2}}]"
    sweep = expand(*WORDS[1:], "model=mine", word, space=ConfigSpace([tmp_path]))
    assert allocation(sweep.config.resources, "train", trained(sweep)[0]).gpus == 2


@pytest.mark.parametrize("line", ["exclude=n3", "--nice\\n--hold", ""])
def test_a_further_option_that_is_none_is_refused(tmp_path: Path, line: str) -> None:
    write_option(tmp_path, "resources/mine", f'defaults: [default]\nextra: ["{line}"]\n')
    found = faults(*WORDS, "resources=mine", space=ConfigSpace([tmp_path]))
    assert any("extra" in each for each in found), found
