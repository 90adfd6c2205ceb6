"""Supervised fine-tuning on the chosen response through TRL 1.16: next-token loss on the response's tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from peft_align.config.schema import Config
from peft_align.data.tokenization import TokenizedPair
from peft_align.training.state import ExactState

IGNORED = -100


class ExactSFTTrainer(ExactState, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, which can be gone on with exactly."""


def trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TokenizedPair],
    config: Config,
    arguments: dict[str, Any],
    callbacks: list[Any],
) -> SFTTrainer:
    """A TRL trainer that takes the rows as they are: tokenized, truncated and in order.

    Args:
        model: the base with a trainable adapter.
        rows: as many as the run has steps times samples a step.
        arguments: what all methods share (training.run.shared_arguments).
    """
    dataset = Dataset.from_list(
        [{"input_ids": row.prompt + row.chosen, "labels": [IGNORED] * len(row.prompt) + row.chosen} for row in rows]
    )
    return ExactSFTTrainer(
        model=model,
        args=SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
