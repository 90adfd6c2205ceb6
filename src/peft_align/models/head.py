"""The vocabulary, looked at only where a token is scored, some positions at a time.

In backward nothing is computed again: while a position's logits are at hand, forward keeps the gradient of the score
with respect to the hidden state, one vector a token. The head's weight must be frozen.

Logits rounded to bf16 (by up to 0.06 at 20) would bring half of the variance in the log-probability of a long response.
Those that carry the score, the target's and the likeliest, are taken again in fp32: a few rows of the head a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

CHUNK = 2**25  # bytes of fp32 logits at a time
LIKELIEST = 4  # tokens whose logits are taken in fp32; 8 and 16 leave as much of the error as 4


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """(N, vocabulary), fp32; exact where it matters when the rest is not."""
    logits = linear(hidden, weight, bias).float()
    if weight.dtype in (torch.float32, torch.float64):
        return logits
    tokens = torch.cat([logits.topk(min(LIKELIEST, len(weight)), sorted=False).indices, targets[:, None]], 1)
    wide = hidden.float()  # and one row of the head a token at a time: five at once would be more than the logits
    exact = torch.stack([weight[token].float().mul_(wide).sum(-1) for token in tokens.T], 1)
    return logits.scatter_(1, tokens, exact if bias is None else exact + bias[tokens].float())


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = max(1, CHUNK // (4 * len(weight)))
        for at in range(0, len(targets), step):
            here = slice(at, at + step)
            logits = _logits(hidden[here], weight, bias, targets[here])
            picked = targets[here, None]
            likeliest = logits.amax(-1, keepdim=True)
            score = logits.gather(1, picked) - likeliest
            share = logits.sub_(likeliest).exp_()
            total = share.sum(-1, keepdim=True)
            out[here] = (score - total.log())[:, 0]
            if gradient is not None:  # of log softmax: the target's row less the mean row
                share.div_(total.neg_()).scatter_add_(1, picked, torch.ones_like(total))
                gradient[here] = share.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None]).to(gradient.dtype), None, None, None


def token_log_probs(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """The log-probability of each target.

    Args:
        hidden: (N, hidden size), the last hidden states.
        head: to the logits of the vocabulary; frozen.
        targets: (N,), token ids.

    Returns:
        (N,), fp32.
    """
    weight, bias = head.weight, head.bias
    found: torch.Tensor = _TokenLogProbs.apply(hidden.to(weight.dtype), weight, bias, targets)  # type: ignore[no-untyped-call]
    return found
