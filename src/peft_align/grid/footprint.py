"""What a training run takes of a GPU's memory, from the model's shape alone. No torch, no download.

Counted as torch 2.13, transformers 5.23, PEFT 0.21, TRL 1.16 and bitsandbytes 0.50 have it for Llama-like models; what
autograd keeps is held against a count of its tensors on a CPU (tests/training/test_footprint_measured.py). Nothing of
it was ever measured on a GPU. All sizes are bytes.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from peft_align.config.schema import DPO, Config, Peft, Shape
from peft_align.grid.cost import BYTES, base_parameters, linear_parameters, module_shapes, trainable_parameters

CARDS = (24, 40, 80)  # GB; of 10**9 bytes: an A10 with ECC shows its 24 as 24.1, an A100 its 40 as 42.9
QUANTIZATION_BLOCK = 64  # weights that share a constant (bitsandbytes, Linear4bit; Dettmers et al. 2023)
NESTED_BLOCK = 256  # constants that share one of their own
CODES = {4: 4 * 16, 8: 4 * 256}  # of a quantised matrix: the values that so many bits stand for, fp32
OPTIMIZER_BLOCK = 256  # values of an 8-bit moment that share a constant (bitsandbytes, Dettmers et al. 2022)
HEAD_CHUNK = 2**25  # models/head.py, which is not imported: torch
TRL_HEAD_TILE = (4096, 32768)  # tokens and vocabulary of a tile of logits (TRL, kernels/chunked_logprob.py)
CUDA_DROPOUT = 1  # of a mask's entry; a CPU keeps factors in the input's precision
LONGEST_ROW = 16384  # training/memory.py, on a GPU
SECOND_TEXT = 2 / 3  # of a row: prompts and second responses, where prompt and responses are of one length
CACHED_MASKS = 64  # models/packed_attention.py

# Assumed, not measured here. The context: the driver's part, the kernels that torch, cuBLAS and bitsandbytes load, and
# cuBLAS's workspace. The slack: free blocks of torch's allocator that fit nothing, as rows of many lengths leave them.
CUDA_CONTEXT = 750_000_000
SLACK = 0.1  # of what comes and goes


@dataclass(frozen=True)
class Memory:
    """What is held when most is.

    Attributes:
        weights: of the frozen base, with its constants if it is quantised.
        adapter: its weights, gradients and the optimizer's states. Paged states count in full: unified memory leaves
            the card only when something else needs the room.
        activations: what autograd keeps for the backward pass.
        working: what comes and goes beside that: a chunk of logits, gradients of a layer, a weight out of 4 bits.
        allowance: the CUDA context, and the allocator's slack.
    """

    weights: float
    adapter: float
    activations: float
    working: float
    allowance: float

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations + self.working + self.allowance


def estimate(
    config: Config, *, budget: int | None = None, checkpointing: bool | None = None, processes: int = 1
) -> Memory | None:
    """The largest memory that training takes of one GPU; None if a target module is not known.

    Args:
        config: of the run.
        budget: tokens of a row (engine packed) or samples of a forward pass (engine trl); None: as the config says, and
            where it leaves that to a measurement, the longest sample, which must fit.
        checkpointing: whether activations are recomputed; None: as the config says, and where it leaves that open, not.
        processes: that train the run together, each on a GPU of its own.
    """
    count = trainable_parameters(config.model.shape, config.peft)
    if count is None:
        return None
    batch = _batch(config, budget, processes)
    recomputed = bool(config.train.gradient_checkpointing) if checkpointing is None else checkpointing
    kept = kept_bytes(config, batch, recomputed)
    working = working_bytes(config, batch, recomputed)
    adapter = count * adapter_bytes(config, processes) * together(config)
    if config.train.optimizer == "adamw_torch":  # its step: a copy of the second moment, when activations are gone
        working = max(working, 4 * count - kept)
    weights = weight_bytes(config.model.shape, config.peft)
    return Memory(weights, adapter, kept, working, CUDA_CONTEXT + SLACK * (kept + working))


@dataclass(frozen=True)
class Choice:
    """How a run is trained on a card.

    Attributes:
        budget: see estimate.
        recomputed: whether activations are.
    """

    budget: int
    recomputed: bool


def choice(config: Config, card: int, processes: int = 1) -> Choice | None:
    """What the config asks for, and what engine packed will come to where it leaves that open; None: it does not fit.

    Args:
        config: of the run.
        card: GB.
        processes: see estimate.
    """
    train = config.train
    asked = train.micro_batch_tokens if train.engine == "packed" else train.micro_batch_size
    ways = (False, True) if train.engine == "packed" else (False,)
    if train.gradient_checkpointing is not None:
        ways = (train.gradient_checkpointing,)
    for recomputed in ways:
        if asked is not None:
            memory = estimate(config, checkpointing=recomputed, processes=processes)
            if memory and memory.total <= card * 1e9:
                return Choice(asked, recomputed)
            continue
        most = largest_budget(config, card, checkpointing=recomputed, processes=processes)
        row = min(LONGEST_ROW, 1 << (most.bit_length() - 1)) if most else 0  # a power of two, as it is measured
        whole = (train.batch_size // processes) * longest_sample(config)  # of a batch: no row is longer
        if row >= longest_sample(config) or most == whole or (row and recomputed):
            return Choice(row, recomputed)
    return None


def largest_budget(config: Config, card: int, *, checkpointing: bool | None = None, processes: int = 1) -> int | None:
    """The largest `budget` of `estimate` that changes anything and with which a card suffices; None: not the smallest.

    Args:
        config: of the run.
        card: GB.
        checkpointing: see estimate.
        processes: see estimate.
    """
    share = config.train.batch_size // processes
    if config.train.engine == "packed":
        tried: range | list[int] = range(longest_sample(config), share * longest_sample(config) + 1)
    else:
        tried = [size for size in range(1, share + 1) if share % size == 0]

    def too_much(budget: int) -> bool:
        memory = estimate(config, budget=budget, checkpointing=checkpointing, processes=processes)
        return memory is None or memory.total > card * 1e9

    fitting = bisect.bisect_left(tried, True, key=too_much)
    return tried[fitting - 1] if fitting else None


def together(config: Config) -> int:
    """How many runs are trained in one process at most, each with an adapter and an optimizer of its own."""
    return config.train.pack_runs if config.train.engine == "packed" else 1


def micro_batch(batch_size: int, at_most: int) -> int:
    """The largest divisor of the effective batch that fits into one forward pass."""
    return next(size for size in range(min(batch_size, at_most), 0, -1) if batch_size % size == 0)


def longest_sample(config: Config) -> int:
    """Tokens that a sample may have, a pair's prompt once: two whole texts where the prompt is short."""
    return config.train.max_length * (2 if isinstance(config.method, DPO) else 1)


def tokens_at_once(config: Config, *, processes: int = 1) -> int:
    """Tokens of the largest forward pass, the padding of engine trl included."""
    return _batch(config, None, processes).tokens


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees.

    Attributes:
        tokens: padding included.
        length: tokens of the longest text.
        scored: tokens whose logits are looked at.
        texts: of engine trl, in rows of their own; 0: one row without padding.
        padded: the texts are of several lengths.
        pairs: the texts are pairs of responses to a prompt.
    """

    tokens: int
    length: int
    scored: int
    texts: int
    padded: bool
    pairs: bool


def _batch(config: Config, budget: int | None, processes: int) -> Batch:
    train, pairs = config.train, isinstance(config.method, DPO)
    share = max(1, train.batch_size // processes)
    if train.engine == "trl":
        texts = micro_batch(share, budget or train.micro_batch_size) * (2 if pairs else 1)
        tokens = texts * train.max_length
        return Batch(tokens, train.max_length, tokens, texts, padded=texts > 1, pairs=pairs)
    longest = longest_sample(config)
    tokens = max(longest, min(budget or train.micro_batch_tokens or longest, share * longest))
    return Batch(tokens, train.max_length, tokens, 0, padded=False, pairs=pairs)


def weight_bytes(shape: Shape, peft: Peft) -> float:
    """The frozen base as it is loaded: nf4 quantises the layers' linear modules, not embeddings, head and norms."""
    whole = base_parameters(shape)
    if peft.base_precision != "nf4":
        return whole * BYTES[peft.base_precision]
    quantised, matrices = linear_parameters(shape), shape.layers * len(module_shapes(shape))
    constants = quantised / QUANTIZATION_BLOCK
    each = 1 + 4 / NESTED_BLOCK if peft.double_quantization else 4
    codes = CODES[4] + (CODES[8] if peft.double_quantization else 0)
    return (whole - quantised) * BYTES[peft.compute_dtype] + quantised / 2 + constants * each + matrices * codes


def adapter_bytes(config: Config, processes: int = 1) -> float:
    """Bytes for each trainable parameter: itself, its gradient, the optimizer's two moments, and copies of it."""
    own = BYTES[config.peft.adapter_dtype]
    frozen = (
        own if config.train.engine == "trl" and isinstance(config.method, DPO) and config.method.init == "sft" else 0
    )
    buckets = own if processes > 1 else 0  # DistributedDataParallel's
    return own + own + moment_bytes(config) + frozen + buckets


def moment_bytes(config: Config) -> float:
    """Bytes of the optimizer's two moments for each trainable parameter."""
    if config.train.optimizer == "paged_adamw_32bit":
        return 8  # in fp32 whatever the adapter's precision
    return 2 * (1 + 4 / OPTIMIZER_BLOCK) if _eight_bits(config) else 2 * BYTES[config.peft.adapter_dtype]


def _eight_bits(config: Config) -> bool:
    return config.train.optimizer in ("adamw_bnb_8bit", "paged_adamw_8bit")


@dataclass(frozen=True)
class Widths:
    """Bytes of a value: of the hidden states between layers, of products' operands, of what goes into an adapter."""

    residual: int
    compute: int
    lora: int


def _widths(config: Config) -> Widths:
    peft = config.peft
    residual = BYTES[peft.compute_dtype if peft.base_precision == "nf4" else peft.base_precision]
    if peft.compute_dtype == "bf16":  # autocast
        return Widths(residual, 2, 2)
    return Widths(residual, residual, BYTES[peft.adapter_dtype])


def _back_and_forth(config: Config) -> bool:
    """PEFT's layers cast their input to the adapter's precision, and autocast casts it back."""
    return config.train.engine == "trl" and BYTES[config.peft.adapter_dtype] != _widths(config).lora


def kept_bytes(config: Config, batch: Batch, recomputed: bool, dropout_mask: int = CUDA_DROPOUT) -> float:
    """What autograd keeps from a forward pass until its backward pass, weights not counted.

    Args:
        config: of the run.
        batch: what the pass sees.
        recomputed: each layer keeps its input only (torch.utils.checkpoint).
        dropout_mask: bytes of an entry.
    """
    shape, width = config.model.shape, _widths(config)
    layer = shape.hidden * width.residual * batch.tokens if recomputed else layer_bytes(config, batch, dropout_mask)
    norm = _norm(config) * batch.tokens
    first = 0 if recomputed else norm  # nothing before the first norm is trained
    scored = shape.hidden * width.residual * batch.scored
    rotary = 2 * width.residual * (shape.hidden // shape.heads) * (batch.length if batch.texts else batch.tokens)
    return shape.layers * layer - first + norm + scored + rotary


def layer_bytes(config: Config, batch: Batch, dropout_mask: int = CUDA_DROPOUT) -> float:
    """What autograd keeps of one layer: the inputs of norms, adapters and attention, what the activation needs."""
    shape, peft, width = config.model.shape, config.peft, _widths(config)
    modules, targets = module_shapes(shape), set(peft.target_modules)
    adapters = 0.0
    for names in ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}):
        mine = sorted(names & targets)
        if not mine:
            continue
        inputs = modules[mine[0]][0]
        shared = not peft.dropout and not _back_and_forth(config) and width.residual == width.lora
        adapters += inputs * width.lora * (1 if shared else len(mine)) + len(mine) * peft.r * width.lora
        adapters += len(mine) * inputs * dropout_mask if peft.dropout else 0
    activation = 3 * shape.ffn * width.compute  # gate, its silu, up
    per_token = 2 * _norm(config) + adapters + _attention(config, batch, width.compute) + activation
    copies = 0  # of weights that autocast rounds
    if peft.compute_dtype == "bf16":
        rounded = sum(a + b for name, (a, b) in modules.items() if name in targets) * peft.r
        copies += 2 * rounded if peft.adapter_dtype == "fp32" else 0
        copies += 2 * sum(a * b for a, b in modules.values()) if peft.base_precision == "fp32" else 0
    return per_token * batch.tokens + copies


def _norm(config: Config) -> int:
    """Per token: its input and the root of the mean square. transformers' own keeps both twice, in fp32."""
    if config.train.engine == "packed":  # models/fused.py
        return config.model.shape.hidden * _widths(config).residual + 4
    return 4 * config.model.shape.hidden + 8


def _attention(config: Config, batch: Batch, width: int) -> float:
    """Per token: query, key, value, output and the logarithm of the sum of exponentials (Dao et al. 2022), masks."""
    shape = config.model.shape
    if (
        not batch.texts
    ):  # models/packed_attention.py: keys and values for each head, the prompt's again beside a second;
        # models/flex_attention.py has neither
        second = SECOND_TEXT * 2 * shape.hidden + batch.length / 3 if batch.pairs else 0
        return width * (4 * shape.hidden + second) + 4 * shape.heads
    if config.model.attention == "eager":
        return width * 3 * shape.hidden + shape.heads * batch.length * (4 + width)
    # of several lengths: keys and values are repeated for each head, and each layer has a mask
    keys = shape.hidden if batch.padded else shape.hidden // shape.heads * shape.kv_heads
    return width * (2 * shape.hidden + 2 * keys + (batch.length if batch.padded else 0)) + 4 * shape.heads


def working_bytes(config: Config, batch: Batch, recomputed: bool, dropout_mask: int = CUDA_DROPOUT) -> float:
    """What comes and goes while `kept_bytes` are kept: the most of the head, the reference and a layer's backward."""
    again = layer_bytes(config, batch, dropout_mask) if recomputed else 0.0
    backward = again + _backward(config, batch)
    return max(_head(config, batch), _reference(config, batch), backward) + _masks(config, batch)


def _head(config: Config, batch: Batch) -> float:
    """While positions are scored: their logits and as much again."""
    shape = config.model.shape
    if config.train.engine == "packed":
        return float(2 * min(HEAD_CHUNK, 4 * shape.vocabulary * batch.scored))
    tokens, vocabulary = TRL_HEAD_TILE
    tile = min(tokens, batch.scored) * vocabulary * _widths(config).compute
    return float(tile + batch.scored * shape.hidden * 6)  # the gradient of the hidden states, in fp32 and then not


def _backward(config: Config, batch: Batch) -> float:
    """In a layer's backward pass: gradients of its widest tensors, and a weight out of 4 bits."""
    shape, width = config.model.shape, _widths(config)
    copies = 2 if config.peft.dropout else 1
    of_inputs = shape.ffn * width.compute
    third = (copies - 1) * of_inputs * batch.tokens  # their sum, when the weight is gone again
    if _back_and_forth(config) and "down_proj" in config.peft.target_modules:
        third += copies * shape.ffn * BYTES[config.peft.adapter_dtype] * batch.tokens
    widest = max(inputs * outputs for inputs, outputs in module_shapes(shape).values())
    weight = widest * width.compute if config.peft.base_precision == "nf4" else 0
    return float(2 * of_inputs * batch.tokens + max(third, weight))


def _reference(config: Config, batch: Batch) -> float:
    """TRL's DPO scores the reference while the policy's activations wait: a layer's tensors, of which none is kept."""
    if config.train.engine != "trl" or not batch.pairs:
        return 0.0
    shape, width = config.model.shape, _widths(config)
    return float(batch.tokens * (3 * shape.ffn * width.compute + 4 * shape.hidden * width.residual))


def _masks(config: Config, batch: Batch) -> float:
    """Of booleans, one for all layers."""
    if batch.texts:
        return float(batch.texts * batch.length**2)
    return CACHED_MASKS * batch.length**2 / 2 if batch.pairs else 0.0
