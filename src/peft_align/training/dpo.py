"""Direct preference optimization through TRL 1.16 (Rafailov et al. 2023, equation 7; the sigmoid loss).

With a fresh adapter the reference is the base with the adapter off; with a continued one TRL keeps a frozen copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from peft_align.config.schema import DPO, Config
from peft_align.data.tokenization import TokenizedPair
from peft_align.training.state import ExactState


class TokenizedDPOTrainer(ExactState, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on rows that are tokenized already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TokenizedPair],
    config: Config,
    arguments: dict[str, Any],
    callbacks: list[Any],
) -> DPOTrainer:
    """A TRL trainer that takes the rows as they are; see training.sft.trainer for the arguments."""
    method = config.method
    assert isinstance(method, DPO)
    dataset = Dataset.from_list(
        [{"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected} for row in rows]
    )
    made = TokenizedDPOTrainer(
        model=model,
        # TRL switches dropout off unless told otherwise; the study trains with it, and 0 is a setting of its own
        args=DPOConfig(**arguments, beta=method.beta, loss_type=["sigmoid"], max_length=None, disable_dropout=False),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if method.init == "base":
        # TRL takes every PeftModel it is handed for a trained one and keeps a frozen copy of it as the reference. A
        # fresh adapter adds nothing (its B is zero): without the copy, TRL switches the adapter off instead.
        model.delete_adapter("ref")
    else:
        for module in model.modules():  # the policy has dropout, the reference is what it is
            if "ref" in getattr(module, "lora_dropout", {}):
                module.lora_dropout["ref"] = torch.nn.Identity()
    return made
