"""plan as people run it: what it counts, and what it never imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Verb = Callable[..., "subprocess.CompletedProcess[str]"]

MODULES = """
import sys
sys.argv = ["plan", *sys.argv[1:]]
from peft_align.plan import main
code = main()
heavy = ("torch", "pandas", "scipy", "transformers", "datasets", "lm_eval", "trl", "peft")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def planned(here: Verb, *words: str) -> dict[str, Any]:
    """What plan --json says."""
    found: dict[str, Any] = json.loads(here("plan", *words, "--json", check=True).stdout)
    return found


def test_full_is_the_whole_study(here: Verb, tmp_path: Path) -> None:
    content = planned(here, "+grid=full")
    assert content["kinds"] == {"train": 596, "merge": 50, "baseline": 8}
    assert (content["runs"], content["parents"], content["done"], content["to_do"]) == (654, 0, 0, 654)
    assert content["axes"]["seed"] == {str(seed): 68 for seed in range(5)}
    assert content["axes"]["method"] == {"sft": 298, "dpo": 298}
    assert content["axes"]["merge"] == {"slerp": 20, "dare_ties": 30}
    assert len({run["id"] for run in content["run_list"]}) == 654
    assert list(tmp_path.iterdir()) == []


def test_main_narrows_to_one_model_and_two_seeds(here: Verb) -> None:
    content = planned(here, "+grid=main", "model=mistral_7b", "seed=0,1")
    assert content["kinds"] == {"train": 32, "merge": 0, "baseline": 2}
    assert content["overrides"] == [
        "model=mistral_7b: block main: 80 of 320 cells kept",
        "seed=0,1: block main: 32 of 80 cells kept",
    ]
    assert {run["axes"]["model"] for run in content["run_list"]} == {"mistral_7b"}


def test_parents_that_the_grid_lacks_are_counted_by_themselves(here: Verb) -> None:
    words = ("+grid=main", "method=dpo", "method.init=sft", "model=tiny", "peft=lora", "dataset=everyday", "seed=0")
    content = planned(here, *words)
    assert content["kinds"] == {"train": 2, "merge": 0, "baseline": 1}
    assert content["parents"] == 2
    assert content["to_do"] == 5
    assert sum(run["parent_only"] for run in content["run_list"]) == 2
    assert content["axes"]["method"] == {"dpo": 2}


def test_what_is_not_pinned_is_named(here: Verb) -> None:
    content = planned(here, "dataset=beavertails,hh_rlhf", "model=tiny")
    assert content["unpinned"] == ["Anthropic/hh-rlhf"]


def test_excluded_cells_are_counted_with_their_reason(here: Verb, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("conf")
    (folder / "grid").mkdir()
    text = "blocks: [{axes: {method: [sft, dpo], seed: [0, 1]}, exclude: [{where: {seed: 1}, reason: too many}]}]"
    (folder / "grid" / "mine.yaml").write_text(text, encoding="utf-8")
    content = planned(here, "+grid=mine", f"--config-dir={folder}")
    assert content["excluded"] == [{"cells": 2, "reason": "too many"}]
    assert content["kinds"]["train"] == 2


@pytest.mark.parametrize("words", [["+grid=full", "--json"], ["+grid=full"], ["+grid=quickstart"]], ids=" ".join)
def test_plan_imports_no_torch_and_nothing_else_that_is_slow(tmp_path: Path, words: list[str]) -> None:
    command = [sys.executable, "-c", MODULES, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout


def test_the_resolved_config_of_the_first_run_is_shown(here: Verb) -> None:
    text = here("plan", "+grid=quickstart", "method=dpo", "--cfg", check=True).stdout
    assert "max_steps: 8" in text
    assert "beta: 0.1" in text
    assert "${" not in text


def test_people_are_shown_counts_axes_and_what_is_to_do(here: Verb) -> None:
    text = here("plan", "+grid=full", "seed=0", check=True).stdout
    for expected in (
        "full: 342 runs (324 train, 10 merge, 8 baseline)",
        "sft (162), dpo (162)",
        "done: 0, to do: 342",
        "override:",
    ):
        assert expected in text


def test_memory_the_card_that_suffices_and_time_are_told_before_anything_runs(here: Verb, tmp_path: Path) -> None:
    words = ("model=mistral_7b", "method=dpo", "peft=qlora", "train.max_length=1024")
    (entry,) = planned(here, *words)["training_kinds"]
    assert entry["peak_bytes"]["recomputed"] < 12e9 < entry["peak_bytes"]["kept"]
    assert entry["cards"]["24"] == {"budget": 16384, "recomputed": True}
    assert entry["largest"]["kept"]["24"] is None
    shown = here("plan", *words, check=True).stdout.partition("estimated from the model's shape:\n")[2].splitlines()[0]
    assert re.fullmatch(
        r"  mistral_7b dpo qlora r=16   \d\d\.\d GB at 2,048 tokens \(\d\.\d GB with gradient checkpointing\)   "
        r"fits 24 GB with gradient checkpointing   up to ~\d+ (min|h) on an A100",
        shown,
    )
    assert list(tmp_path.iterdir()) == []


def test_what_the_docs_show_of_memory_and_time_is_what_plan_says(here: Verb) -> None:
    page = (Path(__file__).parents[1] / "docs" / "grids.md").read_text(encoding="utf-8")
    said = here("plan", "model=mistral_7b", "method=dpo", "peft=qlora,lora", check=True).stdout
    lines = said.partition("estimated from the model's shape:\n")[2].splitlines()[:2]
    assert "```\n" + "\n".join(lines) + "\n```\n" in page


def test_many_kinds_of_run_are_shown_in_part_and_counted(here: Verb) -> None:
    text = here("plan", "+grid=full", "seed=0", check=True).stdout.partition("estimated from the model's shape:\n")[2]
    assert "llama_7b|vicuna_7b sft lora r=64" in text
    assert re.search(r"^  and \d+ more kinds of run: --json has all$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "name", ["plan", "sweep", "status", "report", "train", "merge", "select", "evaluate", "judge", "clean"]
)
def test_help_shows_three_examples_whatever_else_is_given(verb: Verb, name: str) -> None:
    text = verb(name, "method.betta=1", "--help", check=True).stdout
    assert sum(line.strip().startswith("python -m peft_align.") for line in text.splitlines()) == 3


def test_what_the_hub_must_provide_is_told_before_anything_trains(
    here: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    (tmp_path / "mirror/SaylorTwift/bbh").mkdir(parents=True)
    words = ("model=mistral_7b", "evaluation.benchmarks=[bbh,gsm8k,preference]", "hub.mirror=mirror")
    needed = {
        "Anthropic/hh-rlhf": "dataset=hh_rlhf",
        "mistralai/Mistral-7B-v0.1": "model=mistral_7b",
        "openai/gsm8k": "benchmark gsm8k",
    }
    content = planned(here, *words)["from_hub"]
    assert content == needed
    assert list(content) == sorted(content)
    shown = here("plan", *words, check=True).stdout.partition("to be read from the hub:\n")[2]
    assert shown.startswith("".join(f"  {repo} ({why})\n" for repo, why in needed.items()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused = here("sweep", *words)
    assert refused.returncode == 2
    assert all(name in refused.stderr for name in needed)
    assert not (tmp_path / "outputs").exists()
