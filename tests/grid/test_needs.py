"""What evaluation.backend=vllm needs, and what it changes of an evaluation's key. vLLM itself was never run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from sweeping import expand, plan

from peft_align.errors import InputError
from peft_align.grid.needs import check_inputs, unready

WORDS = ("model=tiny", "dataset=everyday", "method=sft")
VLLM = "evaluation.backend=vllm"


def faults(root: Path, *words: str, benchmark: str = "everyday_mc") -> str:
    return "; ".join(map(str, unready(plan(expand(*WORDS, f"evaluation.benchmarks=[{benchmark}]", *words), root))))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_nothing_starts_and_the_message_says_what_to_install(tmp_path: Path) -> None:
    assert faults(tmp_path, "peft=lora") == ""
    with pytest.raises(InputError, match=r"the package vllm is not installed.*pip install vllm"):
        check_inputs(plan(expand(*WORDS, "evaluation.benchmarks=[everyday_mc]", "peft=lora", VLLM), tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_base_of_4_bits_is_not_for_vllm_unless_another_precision_is_evaluated(tmp_path: Path) -> None:
    assert "is scored on a base of 4 bits" in faults(tmp_path, "peft=qlora", VLLM)
    assert "4 bits" not in faults(tmp_path, "peft=qlora", VLLM, "evaluation.base_precision=bf16")
    assert "4 bits" not in faults(tmp_path, "peft=lora", VLLM)


def test_benchmarks_that_vllm_does_not_compute_need_none(tmp_path: Path) -> None:
    assert faults(tmp_path, "peft=qlora", VLLM, benchmark="preference") == ""


def test_the_backend_is_part_of_the_key_only_where_it_is_another_than_before(tmp_path: Path) -> None:
    def key(*words: str) -> dict[str, object]:
        sweep = expand(*WORDS, "evaluation.benchmarks=[everyday_mc]", "peft=lora", *words)
        (item,) = (item for item in plan(sweep, tmp_path) if item.run.kind == "baseline")
        return item.requests[0].key or {}

    assert "backend" not in key()
    assert key(VLLM).keys() - key().keys() == {"backend"}
