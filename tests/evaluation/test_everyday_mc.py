"""The multiple-choice task of the package, as lm-eval loads and runs it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval")

TASKS = Path(str(files("peft_align"))) / "evaluation" / "tasks"
NAME = "everyday_mc"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in another directory: the task must find its data by itself."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def manager() -> Any:
    """Return a task manager that knows the package's tasks only."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=False)


def test_task_loads(manager: Any) -> None:
    task = manager.load([NAME])["tasks"][NAME]
    docs = list(task.test_docs())
    assert len(docs) >= 120
    assert task.config.output_type == "multiple_choice"
    assert task.config.num_fewshot == 0
    assert task.config.metadata["version"] == 1.0
    assert task.doc_to_text(docs[0]) == f"Question: {docs[0]['question']}\nAnswer:"
    assert task.doc_to_target(docs[0]) == docs[0]["answer"]


def test_choices_are_scored_as_their_text(manager: Any) -> None:
    task = manager.load([NAME])["tasks"][NAME]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    doc = next(iter(task.test_docs()))
    prompt = f"Question: {doc['question']}\nAnswer:"
    assert [request.arguments for request in task.instances] == [(prompt, f" {choice}") for choice in doc["choices"]]


def test_task_evaluates(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.dummy import DummyLM

    # lm-eval notes the tokenizer's special tokens; the dummy model would fetch a tokenizer from the hub for that.
    monkeypatch.setattr(DummyLM, "tokenizer", None)
    results = lm_eval.simple_evaluate(
        model="dummy", tasks=[NAME], task_manager=manager, limit=5, bootstrap_iters=0, log_samples=True
    )
    assert results["n-samples"][NAME]["effective"] == 5
    assert len(results["samples"][NAME]) == 5
    for metric in ("acc,none", "acc_norm,none"):
        assert 0 <= results["results"][NAME][metric] <= 1
