"""What can be said of vLLM without running it: the rank that it is started for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_align.evaluation.vllm_model import _served_rank


@pytest.mark.parametrize(("own", "served"), [(4, 8), (16, 16), (17, 32), (300, 320)])
def test_the_engine_has_room_for_the_adapters_rank(own: int, served: int, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": own}))
    assert _served_rank(tmp_path) == served


def test_a_bare_base_takes_the_smallest_room() -> None:
    assert _served_rank(None) == 8
