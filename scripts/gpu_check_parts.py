"""What gpu_check.py looks at, each part by itself; packages are imported by the parts that need them."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_check_engines import TARGETS, estimated, trained

SIZES = {  # layers, hidden, heads, key-value heads, feed-forward, vocabulary
    "tiny": (2, 64, 4, 2, 128, 500),
    "small": (12, 768, 12, 4, 2048, 32000),
    "1b": (16, 2048, 32, 8, 8192, 32000),
}
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "flash-attn", "hydra-core")
EQUAL = {"fp32": 1e-4, "bf16": 3e-2}  # relative
Figures = dict[str, Any]
Parts = Iterator[tuple[str, str, Figures]]  # check, verdict, figures; see gpu_check.Finding


@dataclass(frozen=True)
class Given:
    """What all parts are given: where, and on which model."""

    device: str
    size: str
    folder: Path | None

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @cached_property
    def base(self) -> Any:
        """The model in fp32 on the CPU; parts take copies."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        if self.folder is not None:
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, local_files_only=True).eval()
        layers, hidden, heads, kv_heads, ffn, vocabulary = SIZES[self.size]
        torch.manual_seed(0)
        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
            intermediate_size=ffn, vocab_size=vocabulary, max_position_embeddings=4096, pad_token_id=0,
            initializer_range=0.8 / hidden**0.5,  # logits that differ
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    def plain(self, dtype: str) -> Any:
        """A frozen copy on the device, its weights in a precision."""
        model = copy.deepcopy(self.base).to(self.device).requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(of_name(dtype))
        return model

    def adapted(self, dtype: str, b: float = 0.02) -> Any:
        """A copy with a LoRA adapter in fp32, whose B has this standard deviation."""
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=TARGETS)
        model = get_peft_model(self.plain(dtype), config, autocast_adapter_dtype=True)  # bf16 to fp32
        for name, parameter in model.named_parameters():
            if "lora_B" in name and b:
                torch.nn.init.normal_(parameter, std=b)
        return model

    def autocast(self, dtype: str) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast(self.device, torch.bfloat16) if dtype == "bf16" else nullcontext()

    def texts(self, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        """Random tokens."""
        import torch

        words, most = torch.Generator().manual_seed(seed), self.base.config.vocab_size
        return [torch.randint(3, most, (length,), generator=words).tolist() for length in lengths]

    def pairs(self, count: int) -> list[tuple[list[int], list[int], list[int]]]:
        """Prompts with two responses each, of lengths as HH-RLHF has them (on the size tiny, a quarter of that)."""
        import random

        draw, scale = random.Random(0), 4 if self.size == "tiny" and self.folder is None else 1
        found = []
        for i in range(count):
            means = (150, 60, 60)
            lengths = [max(8, min(400, int(draw.lognormvariate(0, 0.7) * mean))) // scale for mean in means]
            prompt, chosen, rejected = self.texts(lengths, seed=i)
            found.append((prompt, chosen, rejected))
        return found

    def seconds(self, work: Callable[[], Any], rounds: int = 3) -> float:
        """Of the fastest of some rounds, after one that does not count."""
        work()
        return min(self._once(work) for _ in range(rounds))

    def _once(self, work: Callable[[], Any]) -> float:
        import torch

        began = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def of_name(dtype: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


def apart(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """How far tensors are from others, all together: the norm of the difference over the norm."""
    import torch

    ours, theirs = (torch.cat([x.detach().double().cpu().flatten() for x in side]) for side in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


def allowed(own: float) -> float:
    """How far from the truth, which is fp32's, what we compute may be, if what others compute is so far from it."""
    return max(EQUAL["fp32"], 2 * own)


def stock(model: Any) -> AbstractContextManager[Any]:
    """The layers as PEFT and transformers have them."""
    return nullcontext()


def verdict(*apart_and_allowed: tuple[float, float]) -> str:
    return "holds" if all(off <= allowed for off, allowed in apart_and_allowed) else "differs"


def gradients(model: Any) -> list[Any]:
    """Of the trained weights, which have none afterwards."""
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def device(given: Given) -> Parts:
    """What there is."""
    import torch

    found: Figures = {"python": platform.python_version(), "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    if given.cuda:
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "memory GB": card.total_memory / 1e9, "cuda": torch.version.cuda}
        found |= {"capability": f"{card.major}.{card.minor}", "cards": torch.cuda.device_count()}
    yield "versions", "measured", found


def products(given: Given) -> Parts:
    """Square products: the most that anything can reach."""
    import torch

    size = 8192 if given.cuda else 1024
    for dtype in ("fp32", "bf16"):
        a, b = (torch.randn(size, size, device=given.device).to(of_name(dtype)) for _ in range(2))
        yield dtype, "measured", {"TFLOP/s": 2 * size**3 / given.seconds(lambda: a @ b) / 1e12}  # noqa: B023


def rows(given: Given) -> Parts:
    """Packed rows, by parts and by flex attention, against each text by itself: log-probabilities and gradients."""
    import torch

    from peft_align.models.flex_attention import WAYS
    from peft_align.models.fused import fused
    from peft_align.models.packed_attention import packed
    from peft_align.models.packed_scoring import response_scores
    from peft_align.models.packing import Sample, pack

    pairs = given.pairs(8)
    row = pack([Sample(tuple(p), (tuple(c), tuple(r))) for p, c, r in pairs], given.device)
    truth: tuple[list[Any], list[Any]] | None = None
    for dtype in ("fp32", "bf16"):
        model = given.adapted(dtype)

        def alone() -> list[Any]:
            found = []
            for prompt, *responses in pairs:
                for words in responses:
                    ids = torch.tensor([prompt + words], device=given.device)
                    with given.autocast(dtype):  # noqa: B023
                        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]  # noqa: B023
                    score = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()
                    (score / len(pairs)).backward()
                    found.append(score.detach())
            return found

        def together(way: str) -> list[Any]:
            base = model.get_base_model()  # noqa: B023
            with packed(base, WAYS[way]), fused(base):
                with given.autocast(dtype):  # noqa: B023
                    scores = response_scores(base, row)
                (scores.sum() / len(pairs)).backward()  # type: ignore[no-untyped-call]
            return [scores.detach()]

        theirs = (alone(), gradients(model))
        truth = truth or theirs
        own = [apart(*both) for both in zip(theirs, truth, strict=True)]
        slow = given.seconds(alone)
        for way in WAYS:
            gradients(model)
            try:
                ours = (together(way), gradients(model))
            except Exception as error:
                if way == "parts":
                    raise
                yield f"{way}, {dtype}", "skipped", {"why": f"flex attention cannot be had: {first_line(error)}"}
                continue
            off = [apart(*both) for both in zip(ours, truth, strict=True)]
            fast = given.seconds(lambda: together(way))  # noqa: B023
            figures = {"scores off": off[0], "gradients off": off[1], "alone off": own[1]}
            times = {"tokens": row.tokens.shape[1], "seconds": fast, "alone, seconds": slow, "faster by": slow / fast}
            yield f"{way}, {dtype}", verdict(*zip(off, map(allowed, own), strict=True)), figures | times


def layers(given: Given) -> Parts:
    """Fused LoRA layers and norms against PEFT's and transformers', and the head against a softmax over all logits."""
    import torch

    from peft_align.models.fused import fused
    from peft_align.models.head import token_log_probs

    ids = torch.tensor(given.texts([256] * 2), device=given.device)
    truth: tuple[Any, ...] | None = None
    for dtype in ("fp32", "bf16"):
        model = given.adapted(dtype).train()
        torch.manual_seed(2)
        direction = torch.randn(given.base.config.hidden_size).to(given.device)

        def work(context: Any) -> tuple[Any, ...]:
            with context(model), given.autocast(dtype):  # noqa: B023
                hidden = model.get_base_model().get_decoder()(ids, use_cache=False).last_hidden_state  # noqa: B023
            (hidden.float() * direction).mean().backward()  # noqa: B023
            return [hidden], gradients(model)  # noqa: B023

        theirs, ours = work(stock), work(fused)
        truth = truth or theirs
        own, off = ([apart(*both) for both in zip(side, truth, strict=True)] for side in (theirs, ours))
        slow, fast = (given.seconds(lambda: work(context)) for context in (stock, fused))  # noqa: B023
        figures = {"outputs off": off[0], "gradients off": off[1], "theirs off": own[1], "faster by": slow / fast}
        yield f"LoRA and RMSNorm, {dtype}", verdict(*zip(off, map(allowed, own), strict=True)), figures
        head = given.plain(dtype).get_output_embeddings()
        last = torch.randn(512, head.in_features, device=given.device, dtype=of_name(dtype), requires_grad=True)
        targets = torch.tensor(given.texts([512])[0], device=given.device)
        found = token_log_probs(last, head, targets)
        expected = head(last).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        both = [torch.autograd.grad(x.sum(), last)[0] for x in (found, expected)]
        off = [apart([found], [expected]), apart(both[:1], both[1:])]
        figures = {"scores off": off[0], "gradients off": off[1]}
        yield f"head, {dtype}", verdict(*((each, EQUAL[dtype]) for each in off)), figures


def nf4(given: Given) -> Parts:
    """A 4-bit layer against its own weights taken out of 4 bits: forward and backward."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit

    inputs, outputs = given.base.config.hidden_size, given.base.config.intermediate_size
    for dtype in ("fp32", "bf16"):
        compute = of_name(dtype)
        layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=compute, quant_type="nf4")
        layer = layer.to(given.device)
        x = torch.randn(512, inputs, device=given.device, dtype=compute, requires_grad=True)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(compute)
        found, expected = layer(x), x @ weight.t()
        both = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
        off = apart([found], [expected]), apart(both[:1], both[1:])
        slow, fast = given.seconds(lambda: layer(x)), given.seconds(lambda: x @ weight.t())  # noqa: B023
        figures = {"outputs off": off[0], "gradients off": off[1], "times a plain product": slow / fast}
        yield dtype, verdict(*((each, EQUAL[dtype]) for each in off)), figures


def prefixes(given: Given) -> Parts:
    """Answers to questions behind the same examples, in rows that share them, against each by itself."""
    import torch

    from peft_align.models.prefix_scoring import log_likelihoods

    shots, *asked = given.texts([300] + [20] * 8)
    answers = given.texts([1, 1, 2, 3], seed=1)
    requests = [(shots + question, answer) for question in asked for answer in answers]
    for dtype in ("fp32", "bf16"):
        model = given.plain(dtype)

        @torch.no_grad()
        def alone() -> list[float]:
            found = []
            for context, answer in requests:
                ids = torch.tensor([context + answer], device=given.device)
                logits = model(ids, use_cache=False).logits[0, len(context) - 1 : -1].float()  # noqa: B023
                found.append(float(logits.log_softmax(-1).gather(1, ids[0, len(context) :, None]).sum()))
            return found

        def shared() -> list[float]:
            return [score for score, _ in log_likelihoods(model, requests, 4096, 4096)]  # noqa: B023

        off = apart([torch.tensor(shared())], [torch.tensor(alone())])
        slow, fast = given.seconds(alone), given.seconds(shared)
        figures = {"scores off": off, "seconds": fast, "alone, seconds": slow, "faster by": slow / fast}
        yield dtype, verdict((off, EQUAL[dtype])), figures


def engines(given: Given) -> Parts:
    """Engine packed against TRL's own trainers on the same batches, and plan's estimate against what it took."""
    for method in ("sft", "dpo"):
        for dtype in ("fp32", "bf16"):
            theirs, ours = (trained(given, method, engine, dtype) for engine in ("trl", "packed"))
            off = [
                max(abs(a - b) / abs(b) for a, b in zip(ours[what], theirs[what], strict=True))
                for what in ("losses", "gradients")
            ]
            figures = {"losses off": off[0], "gradients off": off[1], "seconds a step": ours["seconds"]}
            figures |= {"TRL, seconds": theirs["seconds"], "faster by": theirs["seconds"] / ours["seconds"]}
            if given.cuda:
                figures |= {"peak GB": ours["peak"] / 1e9, "TRL, peak GB": theirs["peak"] / 1e9}
            yield f"{method}, {dtype}", verdict(*((each, 2 * EQUAL[dtype]) for each in off)), figures
            yield f"{method}, {dtype}: choice", "measured", ours["memory"]
            if given.cuda:
                most = estimated(given, ours)
                figures = {"estimated GB": most / 1e9, "taken GB": ours["peak"] / 1e9}
                yield f"{method}, {dtype}: memory", verdict((ours["peak"], most)), figures
    if not given.cuda:
        yield "memory", "skipped", {"why": "only a GPU keeps an account of what is allocated"}


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


PARTS: dict[str, Callable[[Given], Parts]] = {
    part.__name__: part for part in (device, products, rows, layers, nf4, prefixes, engines)
}
