"""lm-eval tasks of the user's own run the user's code, when they are evaluated and not before; a model's code never."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweeping import expand, plan, trained

from peft_align.evaluation import harness
from peft_align.evaluation.lm_eval_tasks import Tasks
from peft_align.models.loading import Base, load_base

TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: !function own.text
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
{more}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task that names a function, whose file leaves another when it is run."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    code = ["import pathlib", f"pathlib.Path({str(tmp_path / 'sung')!r}).touch()", "def text(doc): return doc['q']", ""]
    (folder / "own.py").write_text("\n".join(code), encoding="utf-8")
    (folder / "data.jsonl").write_text('{"q": "a?", "choices": ["b", "c"], "answer": 0}\n' * 2, encoding="utf-8")
    return folder


def words(folder: Path) -> tuple[str, ...]:
    own = ("evaluation.benchmarks=[my_task]", f"evaluation.include_path={folder}")
    return ("model=tiny", "dataset=everyday", "method=sft", "peft=lora", *own)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(trained(expand("model=tiny", "dataset=everyday", "method=sft", "peft=lora"))[0].config)


def evaluate(folder: Path, base: Base) -> float:
    (scoring,) = trained(expand(*words(folder)))[0].scorings
    (_, benchmark), *_ = scoring.benchmarks
    return harness.evaluate(benchmark, scoring, base, base.model, None, Tasks()).metrics[0].value  # type: ignore[arg-type]


def test_own_tasks_are_run_when_they_are_evaluated_and_not_before(
    tmp_path: Path, tasks: Path, base: Base, small_lm_eval: None
) -> None:
    (tasks / "my_task.yaml").write_text(TASK.format(folder=tasks, more=""), encoding="utf-8")
    sweep = expand(*words(tasks))
    assert any(item.missing for item in plan(sweep, tmp_path / "root"))
    assert not (tmp_path / "sung").exists(), "a plan reads the task as text"
    assert evaluate(tasks, base) in (0.0, 0.5, 1.0)
    assert (tmp_path / "sung").exists()


def test_a_task_that_runs_what_the_model_writes_is_refused(tasks: Path, base: Base, small_lm_eval: None) -> None:
    (tasks / "my_task.yaml").write_text(TASK.format(folder=tasks, more="unsafe_code: true"), encoding="utf-8")
    with pytest.raises(ValueError, match="marked as unsafe"):
        evaluate(tasks, base)
