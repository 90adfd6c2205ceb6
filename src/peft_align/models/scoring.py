"""Log-probabilities of responses given their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.inference_mode()
def response_log_probabilities(
    model: Any,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    batch_size: int,
    pad_token_id: int,
    tick: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Sum of the log-probabilities of each response's tokens, natural logarithm, accumulated in fp32.

    Args:
        model: a causal language model, with or without an adapter.
        pairs: (prompt ids, response ids); both not empty.
        batch_size: sequences per forward pass; longest first, so that a batch has like lengths.
        tick: called with the number of sequences done.

    Returns:
        One value a pair, in the order given.
    """
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    scores = [0.0] * len(pairs)
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        lengths = [len(pairs[i][0]) + len(pairs[i][1]) for i in batch]
        ids = torch.full((len(batch), max(lengths)), pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        scored = torch.zeros_like(ids, dtype=torch.bool)  # position t is scored if token t + 1 is the response's
        for row, (i, length) in enumerate(zip(batch, lengths, strict=True)):
            prompt, response = pairs[i]
            ids[row, :length] = torch.tensor(prompt + response)
            mask[row, :length] = 1
            scored[row, len(prompt) - 1 : length - 1] = True
        first = int(scored.any(dim=0).nonzero()[0])  # logits from the first response token on
        keep = torch.arange(first, max(lengths), device=device)
        logits = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=keep, use_cache=False
        ).logits[:, :-1]
        targets = ids[:, first + 1 :].to(device)
        wanted = scored[:, first:-1].to(device)
        for row, i in enumerate(batch):
            chosen = logits[row][wanted[row]].float()
            token = targets[row][wanted[row]]
            scores[i] = float(torch.log_softmax(chosen, dim=-1).gather(1, token[:, None]).sum())
        tick(min(start + batch_size, len(order)))
    return scores
