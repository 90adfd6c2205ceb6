"""The part `engines` of gpu_check.py: a few training steps by either engine, through the package's own trainers."""

from __future__ import annotations

import gc
import io
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_check_parts import Given

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 3  # the first of which is not timed
BATCH = 8
MICRO_BATCH = 4  # of TRL; engine packed chooses for itself


def trained(given: Given, method: str, engine: str, dtype: str) -> dict[str, Any]:
    """Make some steps from a fresh adapter.

    Returns:
        losses and norms of gradients by step, the median seconds of a step, bytes at the peak (of a GPU), what the
        engine chose, and the config.
    """
    import torch
    from transformers import TrainerCallback

    from peft_align.data.tokenization import TokenizedPair
    from peft_align.models.adapters import adapter_weights, restore_adapter
    from peft_align.store.references import References
    from peft_align.training.engine import PackedTrainer
    from peft_align.training.recorder import memory_choice
    from peft_align.training.run import METHODS, shared_arguments

    losses: list[float] = []
    norms: list[float] = []
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        begun = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if given.cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.begun)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))
                norms.append(float(logs["grad_norm"]))

    gc.collect()  # the trainer before, which would count
    pairs = [TokenizedPair(str(i), *pair) for i, pair in enumerate(given.pairs(STEPS * BATCH))]
    model = given.adapted(dtype, b=0.0)
    config = settings(given, method, engine, dtype, pairs)
    before = adapter_weights(model)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        arguments = shared_arguments(config, Path(folder))
        trainer = METHODS[engine, method](model, tokenizer(given), pairs, config, arguments, [Clock()])
        restore_adapter(model, before, config.peft)
        if isinstance(trainer, PackedTrainer):
            trainer.choose({})
            trainer.prepare(References(Path(folder), {}), lambda done: None)
        if given.cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return {
        "losses": losses,
        "gradients": norms,
        "seconds": sorted(seconds[1:])[len(seconds[1:]) // 2],
        "peak": torch.cuda.max_memory_allocated() if given.cuda else None,
        "memory": memory_choice(trainer),
        "config": config,
    }


def estimated(given: Given, run: dict[str, Any]) -> float:
    """Bytes that plan expects such a run to take at most; of its CUDA context torch counts a workspace alone."""
    from peft_align.grid.footprint import estimate

    memory = estimate(
        run["config"],
        budget=run["memory"]["micro_batch_tokens"],
        checkpointing=run["memory"]["gradient_checkpointing"],
    )
    assert memory is not None, "all target modules are known"
    return memory.total


def settings(given: Given, method: str, engine: str, dtype: str, pairs: list[Any]) -> Any:
    """The parts of a run's config that trainers and the estimate look at; no YAML, no Hydra."""
    from peft_align.config.schema import DPO, SFT, Adapter, Optimization, Peft, Shape, Train

    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
    adapter, optimization = Adapter(8, 16, 0.0, TARGETS), Optimization(1e-4, 0.0, 1.0, "constant")
    of = given.base.config
    shape = Shape(
        *(of.num_hidden_layers, of.hidden_size, of.num_attention_heads, of.num_key_value_heads),
        *(of.intermediate_size, of.vocab_size, bool(of.tie_word_embeddings)),
    )
    return SimpleNamespace(
        seed=0,
        method=SFT("sft", adapter, optimization) if method == "sft" else DPO("dpo", 0.1, "base", adapter, optimization),
        model=SimpleNamespace(shape=shape, attention="sdpa"),
        peft=Peft(dtype, False, dtype, "fp32", adapter.r, adapter.alpha, 0.0, TARGETS),
        train=Train(
            engine=engine, max_steps=STEPS, batch_size=BATCH, learning_rate=1e-4, weight_decay=0.0, max_grad_norm=1.0,
            schedule="constant", warmup_steps=0, optimizer="adamw_torch", adam_betas=[0.9, 0.999], max_length=longest,
            checkpoint_steps=[STEPS], micro_batch_size=MICRO_BATCH, micro_batch_tokens=None, state_every=STEPS,
            gradient_checkpointing=None,
        ),
    )  # fmt: skip


def tokenizer(given: Given) -> Any:
    """One that trainers find their padding in; nothing is encoded."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
