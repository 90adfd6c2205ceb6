"""lm-eval's benchmarks by vLLM (`evaluation.backend=vllm`), through the class that lm-eval 0.4.13 has for it.

Never run: vLLM needs a GPU, and none was at hand. Written after the sources of lm-eval and of vLLM 0.33. One engine is
started for a base and serves all adapters on it; beside it the base stays loaded for the other benchmarks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_align.models.loading import Base

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be started for
SHARE = 0.5  # of the card's memory that vLLM takes: the base is loaded for the other benchmarks too
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass
class Engine:
    """Keeps the engine that was started last, for the runs that share its base."""

    _started: tuple[str, int] | None = None  # the base's digest, and the largest rank
    _model: Any = None
    _adapters: dict[tuple[Path, int], int] = field(default_factory=dict)  # vLLM tells adapters apart by number

    def with_adapter(self, base: Base, precision: str, adapter: Path | None) -> Any:
        """An lm-eval model that answers with an adapter, or as the bare base.

        Args:
            base: whose weights are served.
            precision: bf16 or fp32.
            adapter: folder in PEFT's format.
        """
        from lm_eval.models.vllm_causallms import VLLM
        from vllm.lora.request import LoRARequest

        rank = _served_rank(adapter)
        known = self._started is not None and self._started[0] == base.source["digest"] + precision
        if not known or (self._started and rank > self._started[1]):
            self._model = None  # free the old one first
            self._model = VLLM(
                pretrained=str(base.folder),
                dtype=DTYPES[precision],
                max_lora_rank=rank,
                enable_lora=True,
                gpu_memory_utilization=SHARE,
            )
            self._started, self._adapters = (base.source["digest"] + precision, rank), {}
        self._model.lora_request = None
        if adapter is not None:
            made = (adapter / "adapter_model.safetensors").stat().st_mtime_ns  # a run may be trained again
            number = self._adapters.setdefault((adapter, made), len(self._adapters) + 1)
            self._model.lora_request = LoRARequest(adapter.name, number, str(adapter))
        return self._model


def _served_rank(adapter: Path | None) -> int:
    """The smallest rank to start vLLM for that has room for an adapter's."""
    if adapter is None:
        return RANKS[0]
    own = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return next(rank for rank in RANKS if rank >= own)
