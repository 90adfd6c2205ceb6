"""Log-probabilities of the responses of a row (models/packing.py)."""

from __future__ import annotations

from typing import Any

import torch

from peft_align.models.head import token_log_probs
from peft_align.models.packed_attention import Unsupported, packed
from peft_align.models.packing import Row, Sample, pack

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative; of other precisions COARSE
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # of configs of transformers
COARSE = 5e-2  # what rounding to bf16 may do to a few rare tokens


def tolerance_of(dtype: torch.dtype) -> float:
    """How far two ways to the same score may be apart in a precision, relative."""
    return TOLERANCE.get(dtype, COARSE)


def token_scores(model: Any, row: Row) -> torch.Tensor:
    """The log-probability of each scored token of a row: (N,), fp32.

    Args:
        model: a transformers causal language model, inside packed_attention.packed.
        row: of samples.
    """
    decoder = model.get_decoder()
    hidden = decoder(
        input_ids=row.tokens, position_ids=row.positions, use_cache=False, segments=row.segments
    ).last_hidden_state[0]
    return token_log_probs(hidden.index_select(0, row.sources), model.get_output_embeddings(), row.targets)


def response_sums(scores: torch.Tensor, row: Row) -> torch.Tensor:
    """The log-probability of each response of a row, (R,), fp64, from those of its scored tokens, (N,)."""
    return torch.zeros(row.responses, dtype=torch.float64, device=scores.device).index_add(
        0, row.owners, scores.double()
    )


def response_scores(model: Any, row: Row) -> torch.Tensor:
    """The summed log-probability of each response of a row: (R,), fp64; see token_scores."""
    return response_sums(token_scores(model, row), row)


def trial_of(vocabulary: int) -> Sample:
    """What a model is tried with: tokens from all over the vocabulary.

    Its first ones are often special and hardly trained: SmolLM2-135M in bf16 gives them 4% off what it does in fp32.
    """
    ids = tuple(vocabulary * i // 13 for i in range(1, 13))
    return Sample(ids[:5], (ids[5:8], ids[8:]))


@torch.no_grad()
def why_not_packed(model: Any, longest: int) -> str | None:
    """Why a model cannot be given rows, found by giving it one; None if it can.

    Args:
        model: a transformers causal language model without an adapter.
        longest: tokens of the longest text to come.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and longest > window:
        return f"it attends to the last {window} tokens only, and there are texts of {longest}"
    dropout = next((name for name in ATTENTION_DROPOUT if getattr(config, name, 0)), None)
    if dropout:
        return f"it has {dropout}"
    if any(p.requires_grad for p in model.get_output_embeddings().parameters()):
        return "its head is trained"
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    trial = trial_of(model.get_input_embeddings().num_embeddings)
    try:
        with packed(model):
            found = response_scores(model, pack([trial], device))
        for words, score in zip(trial.responses, found.tolist(), strict=True):
            ids = torch.tensor([trial.prompt + words], device=device)
            alone = model(ids, use_cache=False).logits[0, len(trial.prompt) - 1 : -1].float().log_softmax(-1)
            expected = float(alone.gather(1, ids[0, len(trial.prompt) :, None]).sum())
            if abs(score - expected) > tolerance_of(model.dtype) * abs(expected):
                return f"it gives {score:.5g} in a row and {expected:.5g} alone"
    except (Unsupported, TypeError, AttributeError, NotImplementedError) as error:
        return str(error)
    finally:
        model.train(was_training)
    return None
