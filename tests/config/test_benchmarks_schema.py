"""Options of benchmarks, judges and suites: all shipped ones load, and a user's own is checked like any setting."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, faults, one_fault, shipped, trained, write_option

from peft_align.config.benchmarks import BENCHMARKS, JUDGED_BY, PAIRED, Generated
from peft_align.config.compose import ConfigSpace, config_dir, read_yaml
from peft_align.config.judges import ANSWERING, JUDGES, SCORING, judge_label
from peft_align.errors import Fault
from peft_align.grid.benchmarks import find_benchmark
from peft_align.grid.planner import JUDGED_VERSIONS, VERSIONS

Verb = Callable[..., "subprocess.CompletedProcess[str]"]
STUDY = ["mmlu", "bbh", "alpaca_eval", "real_toxicity", "red_instruct"]
SUITES = {
    "paper": STUDY,
    "paper_small": STUDY,
    "tradeoffs": [
        *STUDY, "preference", "hhh_alignment", "truthfulqa", "gsm8k", "ifeval", "over_refusal", "divergence",
    ],
}  # fmt: skip
TINY = ("model=tiny", "dataset=everyday")


def asked(*names: str) -> str:
    return f"evaluation.benchmarks=[{','.join(names)}]"


# --- what is shipped


@pytest.mark.parametrize("name", shipped().options("benchmark"))
def test_every_shipped_benchmark_is_what_its_file_says(name: str) -> None:
    found: list[Fault] = []
    benchmark: Any = find_benchmark(shipped(), name, None, {}, found)
    assert found == []
    written = read_yaml(config_dir() / "benchmark" / f"{name}.yaml")
    assert type(benchmark) is BENCHMARKS[written["kind"]]
    loaded = dataclasses.asdict(benchmark)
    assert {key: loaded[key] for key in written} == written
    if isinstance(benchmark, Generated):  # what is generated is said in full: a default must not change a result
        assert set(loaded) == set(written)


@pytest.mark.parametrize("option", shipped().options("judge"))
def test_every_shipped_judge_is_what_its_file_says(option: str) -> None:
    judge: Any = trained(expand(*TINY, asked("preference"), f"judge={option}"))[0].config.judge
    written = read_yaml(config_dir() / "judge" / f"{option}.yaml")
    assert type(judge) is JUDGES[written["kind"]]
    assert dataclasses.asdict(judge) == written
    assert judge_label(option, judge).startswith(option)


def test_every_kind_of_benchmark_and_judge_has_a_shipped_option() -> None:
    def kinds(group: str) -> set[str]:
        return {str(shipped().load(group, option)["kind"]) for option in shipped().options(group)}

    assert kinds("benchmark") == set(BENCHMARKS)
    assert kinds("judge") == set(JUDGES)


def test_every_generated_kind_can_be_judged_and_every_kind_has_a_version() -> None:
    generated = {kind for kind, cls in BENCHMARKS.items() if issubclass(cls, Generated)}
    assert set(JUDGED_BY) == set(JUDGED_VERSIONS) == generated
    assert set(VERSIONS) == set(BENCHMARKS)
    assert {kind for kinds in JUDGED_BY.values() for kind in kinds} == set(ANSWERING) | set(SCORING)
    assert {*ANSWERING, *SCORING, "none"} == set(JUDGES)
    assert set(PAIRED) < set(BENCHMARKS) - generated


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_is_these_benchmarks_in_this_order(suite: str) -> None:
    for run in expand(*TINY, f"evaluation={suite}").runs:
        assert [[name for name, _ in scoring.benchmarks] for scoring in run.scorings] == [SUITES[suite]]


def test_every_suite_is_one_of_these() -> None:
    assert set(shipped().options("evaluation")) == {"default", *SUITES}


def test_the_suites_scale_the_same_settings() -> None:
    """`paper_small` is `paper` with fewer samples and shorter texts, and nothing else."""
    small, paper = (trained(expand(*TINY, f"evaluation={suite}"))[0].scorings[0] for suite in ("paper_small", "paper"))
    smaller = dataclasses.replace(small.evaluation, limit=None, max_new_tokens=None)
    assert smaller == paper.evaluation
    assert small.evaluation.limit is not None
    assert dataclasses.replace(small, evaluation=paper.evaluation) == paper


def test_the_suites_are_planned_without_the_hub(here: Verb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    content = json.loads(here("plan", *TINY, "evaluation=tradeoffs", "judge=gpt4", "--json", check=True).stdout)
    assert content["kinds"]["train"] == content["kinds"]["baseline"] == 1
    needed = {repo for name in SUITES["tradeoffs"] for repo in shipped().load("benchmark", name)["data"]}
    assert set(content["from_hub"]) == needed | {"nicholasKluge/ToxicityModel"}


# --- a user's own


BENCHMARK = """
kind: over_refusal
metrics: [over_refusal]
data: [my/prompts]
prompt_file: null
use_template: true
max_new_tokens: 32
max_prompt_tokens: 64
temperature: 0
top_p: 1
samples_per_prompt: 1
seed: 0
stop: []
strip_thinking: true
judge: null
"""
JUDGE = """
kind: classifier
hub_id: my/classifier
revision: null
label: toxic
higher_is_better: false
max_length: 64
precision: fp32
batch_size: 4
"""
# What is written in the file: what takes its place, and what is told of it. {} is the file's name.
BENCHMARK_FAULTS = {
    "unknown key": (
        "seed: 0",
        "seed: 0\nmax_new_token: 8",
        "benchmark/{}.max_new_token: no such key",
        "max_new_tokens",
    ),
    "key of another kind": ("seed: 0", "seed: 0\ntask: mmlu", "benchmark/{}.task: no such key", ""),
    "missing key": ("seed: 0", "", "benchmark/{}.seed: is missing", ""),
    "text for a number": ("max_new_tokens: 32", "max_new_tokens: many", "benchmark/{}.max_new_tokens: 'many'", ""),
    "number for a truth": ("use_template: true", "use_template: 1", "benchmark/{}.use_template: 1 is not true", ""),
    "text for a list": ("stop: []", "stop: end", "benchmark/{}.stop: a list", ""),
    "out of range": ("top_p: 1", "top_p: 1.5", "benchmark/{}.top_p: 1.5 is out of range", ""),
    "wrong kind": ("kind: over_refusal", "kind: over_refusl", "benchmark/{}.yaml: kind: 'over_refusl'", "over_refusal"),
    "unknown judge": ("judge: null", "judge: gpt5", "benchmark.{}.judge=gpt5: there is no such judge", "gpt4"),
}
JUDGE_FAULTS = {
    "unknown key": ("label: toxic", "label: toxic\nlabl: x", "labl: no such key", "label"),
    "key of another kind": ("label: toxic", "label: toxic\nbase_url: x", "base_url: no such key", ""),
    "wrong type": ("batch_size: 4", "batch_size: four", "batch_size: 'four' is not a whole number", ""),
    "no choice": ("precision: fp32", "precision: fp23", "precision: 'fp23' is not one of its values", "fp32"),
    "wrong kind": ("kind: classifier", "kind: classifer", "kind: 'classifer' is not", "classifier"),
}


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def test_a_users_benchmark_and_judge_are_taken(tmp_path: Path) -> None:
    write_option(tmp_path, "benchmark/mine", BENCHMARK.replace("over_refusal", "real_toxicity").replace(
        "prompt_file: null", "prompts: 4\nsort_by: threat\nscored: continuation\nthreshold: 0.5"
    ).replace("judge: null", "judge: own"))  # fmt: skip
    write_option(tmp_path, "judge/own", JUDGE)
    (scoring,) = trained(expand(*TINY, asked("mine"), space=ConfigSpace([tmp_path])))[0].scorings
    ((name, option, judge),) = scoring.judges
    assert (name, option, judge.kind) == ("mine", "own", "classifier")
    assert judge_label(option, judge) == "own/classifier"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ConfigSpace:
    """A user's folder with every faulty file."""
    folder = tmp_path_factory.mktemp("faulty")
    for case, (old, new, *_) in BENCHMARK_FAULTS.items():
        write_option(folder, f"benchmark/{option_of(case)}", changed(BENCHMARK, old, new))
    for case, (old, new, *_) in JUDGE_FAULTS.items():
        write_option(folder, f"judge/{option_of(case)}", changed(JUDGE, old, new))
    return ConfigSpace([folder])


def option_of(case: str) -> str:
    return case.replace(" ", "_")


@pytest.mark.parametrize("case", BENCHMARK_FAULTS)
def test_a_fault_in_a_users_benchmark_is_told_with_its_file_and_key(case: str, faulty: ConfigSpace) -> None:
    _, _, message, meant = BENCHMARK_FAULTS[case]
    fault = one_fault(*TINY, asked(option_of(case), "preference"), space=faulty)
    assert fault.startswith(message.format(option_of(case)))
    assert f"did you mean '{meant}'?" in fault or not meant


@pytest.mark.parametrize("case", JUDGE_FAULTS)
@pytest.mark.parametrize("whose", ["of the sweep", "of a benchmark"])
def test_a_fault_in_a_users_judge_is_told_with_its_key(case: str, whose: str, faulty: ConfigSpace) -> None:
    _, _, message, meant = JUDGE_FAULTS[case]
    words = {"of the sweep": "judge={}", "of a benchmark": "benchmark.real_toxicity.judge={}"}
    fault = one_fault(*TINY, asked("real_toxicity"), words[whose].format(option_of(case)), space=faulty)
    assert fault.startswith("judge" if whose == "of the sweep" else f"judge/{option_of(case)}")
    assert message in fault
    assert f"did you mean '{meant}'?" in fault or not meant


def test_a_judge_whose_file_cannot_be_read_is_not_told_as_absent(tmp_path: Path) -> None:
    write_option(tmp_path, "judge/broken", "kind: [")
    words = (*TINY, asked("real_toxicity"), "benchmark.real_toxicity.judge=broken")
    fault = one_fault(*words, space=ConfigSpace([tmp_path]))
    assert "broken" in fault
    assert "there is no such judge" not in fault


def test_a_judge_that_extends_another_can_be_a_benchmarks_own(tmp_path: Path) -> None:
    write_option(tmp_path, "judge/strict", "defaults: [gpt4, _self_]\nmax_tokens: 7\n")
    space = ConfigSpace([tmp_path])
    words = (*TINY, asked("alpaca_eval"))
    whole, own = (
        trained(expand(*words, word, space=space))[0].scorings[0].judges
        for word in ("judge=strict", "benchmark.alpaca_eval.judge=strict")
    )
    assert own == whole
    assert whole[0][2].max_tokens == 7


def test_all_faults_of_several_files_are_told_at_once(faulty: ConfigSpace) -> None:
    cases = ("missing key", "wrong kind", "text for a number")
    words = (asked(*map(option_of, cases), "real_toxicity", "mmul"), "benchmark.real_toxicity.judge=no_choice")
    found = faults(*TINY, *words, "benchmark.real_toxicity.seed=-1", space=faulty)
    expected = [BENCHMARK_FAULTS[case][2].format(option_of(case)) for case in cases]
    expected += ["benchmark/real_toxicity.seed: -1 is out of range", "evaluation.benchmarks: mmul"]
    assert len(found) == len(expected)  # the judge of a benchmark that is not one is not looked at
    for text in expected:
        assert [fault for fault in found if fault.startswith(text)], (text, found)
    again = faults(*TINY, *words, space=faulty)
    assert [fault for fault in again if fault.startswith("judge/no_choice.precision")], again
    assert len(again) == len(expected)


def test_a_program_given_faulty_files_exits_with_2_and_leaves_nothing(
    here: Verb, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("conf")
    write_option(folder, "benchmark/mine", changed(BENCHMARK, *BENCHMARK_FAULTS["unknown key"][:2]))
    write_option(folder, "judge/own", changed(JUDGE, *JUDGE_FAULTS["no choice"][:2]))
    words = (asked("mine", "real_toxicity"), "benchmark.real_toxicity.judge=own", "--config-dir", str(folder))
    done = here("sweep", *TINY, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("peft_align: 2 faults in the input; nothing was started.\n")
    assert "benchmark/mine.max_new_token: no such key (did you mean 'max_new_tokens'?)" in done.stderr
    assert "judge/own.precision: 'fp23' is not one of its values (did you mean 'fp32'?)" in done.stderr
    assert list(tmp_path.iterdir()) == []
