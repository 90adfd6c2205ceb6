"""Benchmarks by name: options, lm-eval tasks, and the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweeping import expand, one_fault, shipped, trained, write_option

from peft_align.config.benchmarks import Benchmark, LmEval
from peft_align.config.compose import ConfigSpace
from peft_align.errors import Fault
from peft_align.grid.benchmarks import find_benchmark, lm_eval_has

pytest.importorskip("lm_eval")


def find(name: str, include: Path | None = None, space: ConfigSpace | None = None) -> tuple[Benchmark | None, str]:
    """The benchmark, and the fault."""
    faults: list[Fault] = []
    found = find_benchmark(space or shipped(), name, str(include) if include else None, {}, faults)
    return found, "; ".join(map(str, faults))


def lm_eval_task(task: str, num_fewshot: int | None, metrics: list[str]) -> LmEval:
    """A benchmark that is an lm-eval task."""
    return LmEval("lm_eval", metrics, [], task, num_fewshot)


@pytest.mark.parametrize("name", shipped().options("benchmark"))
def test_every_shipped_benchmark_is_valid_and_its_task_exists(name: str) -> None:
    found, fault = find(name)
    assert fault == ""
    assert found is not None
    assert not isinstance(found, LmEval) or lm_eval_has(found.task, None)


@pytest.mark.parametrize("name", ["arc_easy", "ai2_arc", "mmlu_stem", "everyday_mc", "hellaswag", "truthfulqa_mc2"])
def test_a_task_group_or_tag_of_lm_eval_needs_no_option(name: str) -> None:
    if name in shipped().options("benchmark"):
        assert lm_eval_has(name, None)
        return
    assert find(name) == (lm_eval_task(name, None, ["*"]), "")


@pytest.mark.parametrize("name", ["mmul", "hellaswagg", "exact_match", "A", "B", "True"])
def test_what_lm_eval_does_not_have_is_a_fault(name: str) -> None:
    found, fault = find(name)
    assert found is None
    assert fault.startswith(
        f"evaluation.benchmarks: {name}: is neither an option of conf/benchmark/ nor an lm-eval task"
    )


def test_a_typo_of_an_option_is_told_with_what_was_meant() -> None:
    assert "did you mean 'mmlu'?" in one_fault("evaluation.benchmarks=[mmul,preference]")


@pytest.mark.parametrize(
    "text",
    [
        "task: my_task\n",
        "task: 'my_task'\n",
        "group: my_task\ntask: [a]\n",
        "tag: my_task\ntask: x\n",
        "tag:\n  - my_task\n  - other\ntask: x\n",
        "group: g\ntask:\n  - task: my_task\n",
    ],
)
def test_a_users_own_task_is_found_in_the_include_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "mine.yaml").write_text(text, encoding="utf-8")
    assert find("my_task", tmp_path)[1] == ""
    assert find("my_task")[0] is None


def test_an_include_path_that_is_no_folder_is_a_fault(tmp_path: Path) -> None:
    found, fault = find("my_task", tmp_path / "nowhere")
    assert found is None
    assert "is not a folder" in fault


def test_a_users_option_is_found_and_checked(tmp_path: Path) -> None:
    fine = "kind: lm_eval\ntask: arc_easy\nnum_fewshot: 3\nmetrics: [acc]\ndata: []\n"
    write_option(tmp_path, "benchmark/fine", fine)
    write_option(tmp_path, "benchmark/no_task", fine.replace("arc_easy", "null"))
    write_option(tmp_path, "benchmark/wrong", fine.replace("[acc]", "[]").replace("num_fewshot: 3", "num_fewshot: -1"))
    write_option(tmp_path, "benchmark/no_kind", fine.replace("kind: lm_eval", "kind: judge"))
    space = ConfigSpace([tmp_path])
    assert find("fine", space=space) == (lm_eval_task("arc_easy", 3, ["acc"]), "")
    assert "benchmark/no_task.task: the value is empty" in find("no_task", space=space)[1]
    wrong = find("wrong", space=space)[1]
    assert "benchmark/wrong.metrics" in wrong
    assert "benchmark/wrong.num_fewshot" in wrong
    assert "benchmark/no_kind.yaml: kind: 'judge' is not one" in find("no_kind", space=space)[1]


def test_a_benchmark_asked_twice_is_scored_once() -> None:
    run = trained(expand("evaluation.benchmarks=[preference,mmlu,preference]"))[0]
    assert [name for name, _ in run.scorings[0].benchmarks] == ["preference", "mmlu"]
