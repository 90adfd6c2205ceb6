"""The benchmarks that generate texts, by kind: each module has `data`, `scores` and `judge`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from peft_align.evaluation import alpaca_eval, over_refusal, real_toxicity, red_instruct

GENERATED: Mapping[str, ModuleType] = {
    "alpaca_eval": alpaca_eval,
    "real_toxicity": real_toxicity,
    "red_instruct": red_instruct,
    "over_refusal": over_refusal,
}
