"""Tasks, requests and their token ids are kept between the runs of a worker, and no record shows it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from sweeping import expand, write_option

from peft_align.config.compose import ConfigSpace
from peft_align.evaluation import lm_eval_tasks
from peft_align.evaluation.lm_eval_tasks import Tasks
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.launch.job import Worker
from peft_align.store.records import read_json
from peft_align.store.runs import RunDir

COMMON = """
dataset_path: someone/questions
test_split: test
fewshot_split: train
doc_to_text: "{{q}}"
"""
# Examples drawn at random; a score by chance and a shuffle of the documents; texts that are sampled.
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_target: answer\ndoc_to_choice: choices\nnum_fewshot: 2\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "chance": "output_type: multiple_choice\ndoc_to_target: answer\ndoc_to_choice: choices\n"
    "process_docs: !function chance.shuffle\n"
    "process_results: !function chance.score\n"
    "metric_list: [{metric: luck, aggregation: mean, higher_is_better: true}]\n",
    "texts": "output_type: generate_until\ndoc_to_target: '{{choices[answer]}}'\nnum_fewshot: 1\n"
    "generation_kwargs: {until: ['|'], max_gen_toks: 6, do_sample: true, temperature: 1.0}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}
CHANCE = """
import random

def shuffle(docs):
    return docs.select(random.sample(range(len(docs)), len(docs)))

def score(doc, results):
    return {"luck": random.random()}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_lm_eval: None) -> Path:
    """A mirror with a dataset, the tasks on it and their options."""
    folder = tmp_path_factory.mktemp("kept")
    data = folder / "mirror/someone/questions"
    data.mkdir(parents=True)
    for split, rows in (("train", 6), ("test", 5)):
        docs = [{"q": f"{split} {i}: ", "choices": ["a", "bb", "ccc"], "answer": i % 3} for i in range(rows)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (folder / "tasks").mkdir()
    (folder / "tasks/chance.py").write_text(CHANCE, encoding="utf-8")
    for name, own in TASKS.items():
        (folder / f"tasks/{name}.yaml").write_text(f"task: my_{name}\n{COMMON}{own}", encoding="utf-8")
        option = f"kind: lm_eval\ntask: my_{name}\nnum_fewshot: null\nmetrics: ['*']\ndata: [someone/questions]\n"
        write_option(folder / "conf", f"benchmark/{name}", option)
    return folder


def runs_of(folder: Path) -> list[Run]:
    """Two adapters that say different things, and their base."""
    words = [
        "model=tiny", "dataset=everyday", "method=sft", "peft=lora", "peft.compute_dtype=fp32", "seed=0,1",
        "train.max_steps=1", "train.batch_size=2", "train.max_length=128", "train.learning_rate=1e-2",
        f"evaluation.benchmarks=[{','.join(TASKS)}]", f"evaluation.include_path={folder / 'tasks'}",
        f"hub.mirror={folder / 'mirror'}", "evaluation.limit=4", "evaluation.max_new_tokens=5",
    ]  # fmt: skip
    return expand(*words, space=ConfigSpace([folder / "conf"])).runs


def recorded(root: Path, run: Run) -> dict[str, Any]:
    """What is on disk of each benchmark: the record without times, and the samples."""
    found = {}
    for request in Planner(root, run.config.hub.mirror).item(run).requests:
        place = RunDir(root, run.id).evaluation(request.name)
        record = read_json(place / "record.json") or {}
        samples = gzip.decompress((place / "samples.jsonl.gz").read_bytes()).decode()
        timeless = {key: record[key] for key in ("key", "metrics", "inputs", "details")}
        found[request.benchmark] = timeless | {"samples": samples.splitlines()}
    return found


def test_runs_of_one_worker_have_the_records_of_a_worker_each(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(datasets, "load_dataset")
    counted(ConfigurableTask, "fewshot_context")
    counted(HFLM, "_encode_pair")
    runs = runs_of(folder)
    assert [run.kind for run in runs] == ["train", "train", "baseline"]
    assert Worker(tmp_path / "one", "test").work(runs)
    assert done == {
        "load_dataset": len(TASKS),
        "fewshot_context": 4 * len(TASKS),
        "_encode_pair": 2 * 4 * 3,  # of the two tasks with 3 choices
    }
    together = [recorded(tmp_path / "one", run) for run in runs]
    alone = []
    for run in runs:
        assert Worker(tmp_path / run.id, "test").work([run])
        alone.append(recorded(tmp_path / run.id, run))
    assert together == alone
    for name in TASKS:  # what is compared is not the same for all anyway
        assert len({repr(each[name]["samples"]) for each in together}) == 3
    assert all(each["choices"]["inputs"].keys() == {"model", "someone/questions"} for each in together)


def test_a_task_of_ones_own_is_loaded_without_lm_evals_index_and_a_group_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    index = lm_eval_tasks.task_manager

    def task_manager(include_path: str | None) -> Any:
        asked.append(include_path)
        return index(include_path)

    monkeypatch.setattr(lm_eval_tasks, "task_manager", task_manager)
    shutil.copytree(folder / "tasks", tmp_path / "tasks")
    (tmp_path / "tasks/both.yaml").write_text("group: my_both\ntask: [my_choices, my_texts]\n", encoding="utf-8")
    scoring = runs_of(folder)[0].scorings[0]
    evaluation = replace(scoring.evaluation, include_path=str(tmp_path / "tasks"))
    benchmark = next(benchmark for name, benchmark in scoring.benchmarks if name == "choices")
    found = [
        sorted(
            Tasks()
            .get(replace(benchmark, task=name), replace(scoring, evaluation=evaluation), str(folder / "mirror"))
            .tasks["tasks"]
        )
        for name in ("my_choices", "my_both")
    ]
    assert found == [["my_choices"], ["my_choices", "my_texts"]]
    assert asked == [str(tmp_path / "tasks")], "for the group alone"


@pytest.mark.slow
def test_a_sweep_has_the_records_of_a_process_for_each_run(verb: Any, tmp_path: Path, mirror: Path) -> None:
    words = (
        "model=tiny", "dataset=everyday", "method=sft", "peft=lora", "peft.compute_dtype=fp32", f"hub.mirror={mirror}",
        "train.max_steps=1", "train.batch_size=2", "train.max_length=128", "train.learning_rate=1e-2",
        "evaluation.benchmarks=[mmlu_anatomy,truthfulqa,gsm8k]", "evaluation.limit=2", "evaluation.max_new_tokens=8",
        "benchmark.gsm8k.num_fewshot=2",
    )  # fmt: skip
    verb("sweep", *words, "seed=0,1", "root=one", "launcher.workers=1", check=True)
    runs = expand(*words, "seed=0,1").runs
    for run in runs[:2]:
        verb("sweep", *words, f"seed={run.config.seed}", f"root={run.id}", "launcher.workers=1", check=True)
        assert recorded(tmp_path / "one", run) == recorded(tmp_path / run.id, run)
