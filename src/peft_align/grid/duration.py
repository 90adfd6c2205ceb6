"""How long a training run takes, from its floating point operations. No torch, no download.

An estimate to choose by: the rates are vendors', the utilisation is assumed, nothing of it was ever measured here.
Where like runs were measured, their pace is what counts (grid/cost.py, measured_paces).
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_align.config.schema import DPO, Config
from peft_align.grid.cost import linear_parameters, trainable_parameters


@dataclass(frozen=True)
class Card:
    """A GPU and what its data sheet says.

    Attributes:
        size: of its memory, GB.
        bf16: dense products that are added up in fp32, FLOP/s.
        fp32: products without tensor cores, as torch computes them unless told otherwise, FLOP/s.
    """

    name: str
    size: int
    bf16: float
    fp32: float


# NVIDIA: data sheets of the A10, A100 and H100 (SXM); white papers of GA102 (RTX 3090) and Ada (RTX 4090).
CARDS = (
    Card("A10", 24, 125e12, 31.2e12),
    Card("RTX 3090", 24, 71e12, 35.6e12),
    Card("RTX 4090", 24, 165.2e12, 82.6e12),
    Card("A100-40GB", 40, 312e12, 19.5e12),
    Card("A100-80GB", 80, 312e12, 19.5e12),
    Card("H100", 80, 989.4e12, 66.9e12),
)
SHOWN_CARD = CARDS[4]
# Assumptions, never measured here.
UTILISATION = 0.35  # of a card's rate, over whole steps
NF4_PACE = 0.75  # of that of a plain base: weights are turned back before each product
ATTENTION_BACKWARD = 2.5  # of its forward pass, which it repeats in part (Dao et al. 2022)


def longest_tokens(config: Config) -> float:
    """The most tokens that the texts of a sample have together, as records count them: a pair's prompt twice."""
    return float(config.train.max_length * (2 if isinstance(config.method, DPO) else 1))


def training_flops(config: Config, tokens: float, recomputed: bool = False) -> float:
    """Floating point operations of a whole run, two for each multiplication and addition.

    A frozen weight takes two operations a token forward, and two backward for the gradient of its input; a trained one
    two more for its own. Recomputed activations are a forward pass more, DPO's reference is one of each sample.

    Args:
        config: of the run.
        tokens: of a sample's texts, as records count them.
        recomputed: whether activations are.
    """
    shape, train, pairs = config.model.shape, config.train, isinstance(config.method, DPO)
    frozen, trained = linear_parameters(shape), trainable_parameters(shape, config.peft) or 0
    length = tokens / (2 if pairs else 1)
    attention = 2 * shape.layers * shape.hidden * length  # half of all products of texts with themselves
    head = 2 * shape.vocabulary * shape.hidden
    again = int(recomputed)
    each = (4 + 2 * again) * frozen + (6 + 2 * again) * trained + (1 + ATTENTION_BACKWARD + again) * attention
    each += head * (2 if train.engine == "packed" else 3)  # TRL computes logits again in backward
    if isinstance(config.method, DPO):
        each += 2 * frozen + attention + head + (2 * trained if config.method.init == "sft" else 0)
    return each * tokens * train.batch_size * train.max_steps


def training_seconds(
    config: Config, card: Card, tokens: float | None = None, *, recomputed: bool = False, processes: int = 1
) -> float:
    """Seconds of training on cards of one kind.

    Args:
        config: of the run.
        card: what it runs on.
        tokens: see training_flops; None: the most that they can be.
        recomputed: see training_flops.
        processes: that train it together.
    """
    flops = training_flops(config, longest_tokens(config) if tokens is None else tokens, recomputed)
    rate = card.bf16 if config.peft.compute_dtype == "bf16" else card.fp32
    pace = NF4_PACE if config.peft.base_precision == "nf4" else 1
    return flops / (rate * UTILISATION * pace * processes)
