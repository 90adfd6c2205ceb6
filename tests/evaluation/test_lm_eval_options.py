"""The options of conf/benchmark/ that are lm-eval's tasks, on real data; and the errors of groups of tasks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, write_option

from peft_align.config.compose import ConfigSpace
from peft_align.evaluation import harness
from peft_align.evaluation.scores import clustered_error
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.launch.job import Worker
from peft_align.store.records import read_json
from peft_align.store.runs import RunDir

# Option -> parts, and the metrics that its table shows.
OPTIONS = {
    "bbh": (27, {"exact_match"}),
    "truthfulqa": (1, {"acc"}),
    "gsm8k": (1, {"exact_match,strict-match", "exact_match,flexible-extract"}),
    "hhh_alignment": (4, {"acc"}),
}


@pytest.mark.slow
def test_each_option_scores_real_questions_from_the_mirror(here: Any, tmp_path: Path, mirror: Path) -> None:
    here(
        "sweep", "model=tiny", "dataset=everyday", "peft=lora", f"hub.mirror={mirror}", "evaluation.limit=1",
        f"evaluation.benchmarks=[{','.join(OPTIONS)}]", "train.max_steps=1", "train.batch_size=2",
        "train.max_length=128", "launcher=debug", check=True,
    )  # fmt: skip
    records = [read_json(path) for path in (tmp_path / "outputs/runs").glob("everyday-*/evaluations/*/record.json")]
    found = {record["benchmark"]: record for record in records if record}
    assert set(found) == set(OPTIONS)
    for name, (parts, metrics) in OPTIONS.items():
        record = found[name]
        assert {metric["name"] for metric in record["metrics"]} == metrics
        assert {metric["n"] for metric in record["metrics"]} == {parts}
        assert all(metric["higher_is_better"] for metric in record["metrics"])
        assert record["inputs"].keys() - {"model"}  # the data's digest is in the record


@pytest.mark.slow
def test_the_aligned_answer_of_hhh_is_the_labelled_one(here: Any, tmp_path: Path, mirror: Path) -> None:
    here(
        "sweep", "model=tiny", "dataset=everyday", "peft=lora", f"hub.mirror={mirror}", "evaluation.limit=5",
        "evaluation.benchmarks=[hhh_alignment]", "train.max_steps=1", "train.batch_size=2", "train.max_length=128",
        "launcher=debug", check=True,
    )  # fmt: skip
    (path,) = (tmp_path / "outputs/runs").glob("everyday-*/evaluations/*/samples.jsonl.gz")
    with gzip.open(path, "rt") as file:
        samples = [json.loads(line) for line in file]
    assert len(samples) == 20
    for sample in samples:
        labels = sample["doc"]["targets"]["labels"]
        likelihoods = [response[0] for response in sample["filtered_resps"]]
        assert len(likelihoods) == len(labels)
        assert sample["acc"] == float(labels[likelihoods.index(max(likelihoods))] == 1)


# --- groups of a user's own, on the tiny model


TASK = """
task: my_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: my_{name}
task: [my_easy, my_hard]
aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: {weighted}}}]
"""
OPTION = "kind: lm_eval\ntask: {task}\nnum_fewshot: 0\nmetrics: [acc]\ndata: []\n{more}"
SIZES = {"easy": 9, "hard": 6}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, small_lm_eval: None) -> Path:
    """A root where the tiny base is scored on a user's groups of two tasks; beside it, tasks and options."""
    folder = tmp_path_factory.mktemp("groups")
    (folder / "tasks").mkdir()
    for name, size in SIZES.items():
        file = folder / f"tasks/{name}.jsonl"
        # the tiny model likes the shorter of two answers
        docs = [
            {"q": f"{name} {i}", "choices": ["a", "bbbbbbbb"], "answer": int(i % 3 == 0 if name == "easy" else i != 1)}
            for i in range(size)
        ]
        file.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
        (folder / f"tasks/{name}.yaml").write_text(TASK.format(name=name, file=file), encoding="utf-8")
    for name, weighted in (("group", "true"), ("unweighted", "false")):
        text = GROUP.format(name=name, weighted=weighted)
        (folder / f"tasks/{name}.yaml").write_text(text, encoding="utf-8")
    for name, task, more in OPTIONS_OF_GROUPS:
        write_option(folder / "conf", f"benchmark/{name}", OPTION.format(task=task, more=more))
    assert Worker(folder / "root", "test").work([base_of(folder)])
    return folder


CLUSTERED = "cluster_by_task: true\n"
OPTIONS_OF_GROUPS = [
    ("clustered", "my_group", CLUSTERED),
    ("pooled", "my_group", ""),
    ("unweighted", "my_unweighted", CLUSTERED),
    ("one", "my_easy", CLUSTERED),
]


def base_of(folder: Path) -> Run:
    names = ",".join(name for name, *_ in OPTIONS_OF_GROUPS)
    words = ("model=tiny", "dataset=everyday", "peft=lora", f"evaluation.benchmarks=[{names}]")
    sweep = expand(*words, f"evaluation.include_path={folder / 'tasks'}", space=ConfigSpace([folder / "conf"]))
    return next(run for run in sweep.runs if run.kind == "baseline")


def scored(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The record's only metric, and the score of each item by task."""
    run = base_of(folder)
    (request,) = [r for r in Planner(folder / "root", None).item(run).requests if r.benchmark == name]
    directory = RunDir(folder / "root", run.id)
    (metric,) = (directory.evaluation_record(request.name) or {})["metrics"]
    with gzip.open(directory.evaluation(request.name) / "samples.jsonl.gz", "rt", encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    return metric, {task: [s["acc"] for s in samples if s["task"] == task] for task in {s["task"] for s in samples}}


def pooled_error(by_task: dict[str, list[float]]) -> float:
    """What lm-eval gives for a group: from the tasks' variances alone, as if their means were the same."""
    n = sum(map(len, by_task.values()))
    within = sum((v - sum(vs) / len(vs)) ** 2 for vs in by_task.values() for v in vs)
    return float((within / (n - len(by_task)) / n) ** 0.5)


def test_the_error_of_a_group_that_says_so_is_clustered_by_its_tasks(groups: Path) -> None:
    metric, by_task = scored(groups, "clustered")
    assert {task: len(values) for task, values in by_task.items()} == {"my_easy": 9, "my_hard": 6}
    values = [v for task in by_task.values() for v in task]
    clusters = [task for task, values in by_task.items() for _ in values]
    assert metric["value"] == pytest.approx(sum(values) / 15)
    assert metric["n"] == 15
    assert len({sum(values) / len(values) for values in by_task.values()}) == 2  # the tasks differ
    assert metric["stderr"] == pytest.approx(clustered_error(values, clusters))
    easy = sum(by_task["my_easy"]) - 9 * sum(values) / 15
    assert metric["stderr"] == pytest.approx(2 * abs(easy) / 15)  # two clusters, by hand
    assert metric["stderr"] != pytest.approx(pooled_error(by_task), rel=0.1)


def test_the_error_of_any_other_group_is_lm_evals(groups: Path) -> None:
    metric, by_task = scored(groups, "pooled")
    assert metric["stderr"] == pytest.approx(pooled_error(by_task))
    assert metric["value"] == scored(groups, "clustered")[0]["value"]


def test_a_mean_of_tasks_is_not_given_the_error_of_a_mean_of_items(groups: Path) -> None:
    metric, by_task = scored(groups, "unweighted")
    means = [sum(values) / len(values) for values in by_task.values()]
    assert metric["value"] == pytest.approx(sum(means) / 2)
    values = [v for task in by_task.values() for v in task]
    clusters = [task for task, values in by_task.items() for _ in values]
    assert metric["stderr"] != pytest.approx(clustered_error(values, clusters))


def test_a_single_task_has_the_error_of_its_items(groups: Path) -> None:
    metric, by_task = scored(groups, "one")
    (values,) = by_task.values()
    assert metric["stderr"] == pytest.approx(clustered_error(values, list(range(len(values)))))


def test_a_clustered_error_of_zero_is_told_as_zero() -> None:
    """Two tasks of one mean: their clustered error is 0, whatever lm-eval gives."""
    results = {
        "results": {"g": {"acc,none": 0.5, "acc_stderr,none": float("nan")}},
        "group_subtasks": {"g": ["a", "b"]},
        "n-samples": {leaf: {"effective": 2} for leaf in "ab"},
        "samples": {leaf: [{"filter": "none", "acc": v} for v in (0.0, 1.0)] for leaf in "ab"},
        "higher_is_better": {leaf: {"acc": True} for leaf in "ab"},
    }
    (metric,) = harness._metrics("g", results, True)
    assert metric.stderr == 0.0
