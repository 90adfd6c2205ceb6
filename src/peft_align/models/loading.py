"""Loads a base model and its tokenizer at one precision; keeps the last one for the runs that share it."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_align.config.identity import short_hash
from peft_align.config.schema import Config, Model, Shape
from peft_align.data.pairs import Pair
from peft_align.data.sources import Split
from peft_align.data.tokenization import TokenizedPair
from peft_align.errors import Fault, InputError
from peft_align.models import tokenizer
from peft_align.models.tokenizer import check_vocabulary, load_tokenizer
from peft_align.store.hub import commit_of, find_repository, model_folder
from peft_align.store.records import Digests, cache_dir, digest_of, inventory, remove_tree, sync_tree, umask, write_json
from peft_align.store.weights import WHOLE, model_faults

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IDENTIFYING = (
    *("*.safetensors", "config.json", "tokenizer*", "*.model", "*.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)


@dataclass
class Shared:
    """What runs and stages on one base have from each other, in a process.

    Attributes:
        split: the training pairs that were read last, and what was asked.
        tokenized: pairs of it that the tokenizer has encoded, by template.
        encoded: ids of contexts and continuations that benchmarks ask about.
        attention: how rows attend, once that was tried: of training, of evaluation; see models/flex_attention.py.
    """

    split: tuple[str, Split] | None = None
    tokenized: dict[tuple[str, Pair], TokenizedPair] = field(default_factory=dict)
    encoded: dict[tuple[str, str], tuple[array[int], array[int]]] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)


@dataclass
class Base:
    """A frozen base model at one precision, and what a record keeps of it.

    Attributes:
        dequantized: quantised weights were turned back into plain ones, to be merged into.
        shared: the same for all copies around its weights.
    """

    model: Any
    tokenizer: Any
    folder: Path
    source: dict[str, Any]
    dequantized: bool = False
    shared: Shared = field(default_factory=Shared)

    @property
    def tokenizer_digest(self) -> str:
        """Of all that may shape the tokenizer: the files but for the weights, and the code that reads them."""
        files = digest_of({name: entry for name, entry in self.source["files"].items() if "safetensors" not in name})
        return short_hash("\n".join([files, transformers.__version__, inspect.getsource(tokenizer)]), 64)


@dataclass
class BaseCache:
    """Keeps the base that was loaded last, so that runs which share it load it once."""

    _key: str = ""
    _base: Base | None = None
    loads: int = field(default=0)

    def get(self, config: Config, *, dequantized: bool = False) -> Base:
        """The base of a run's config. Raises InputError if it is not to be had."""
        peft = config.peft
        key = repr((config.model, peft.base_precision, peft.double_quantization, peft.compute_dtype, dequantized))
        if self._base is None or self._key != key:
            self._base = None  # free the old one first, and the trainers that refer to it in circles
            gc.collect()
            pass_over_modules()
            self._base, self._key = load_base(config, dequantized=dequantized), key
            self.loads += 1
        return self._base


@cache
def pass_over_modules() -> None:
    """Have collections of garbage, of which each training makes two, pass over what was imported: half a second each.

    Once in a process, before it has a model: what is there now is never looked at again.
    """
    gc.freeze()


def with_own_modules(base: Base) -> Base:
    """The base once more: modules of its own, which can be given an adapter, around the very same weights."""
    model = base.model
    same: list[object] = [*model.parameters(), *model.buffers()]
    same += [module.quant_state for module in model.modules() if getattr(module, "quant_state", None) is not None]
    return replace(base, model=copy.deepcopy(model, {id(each): each for each in same}))


def device() -> torch.device:
    """The accelerator if there is one, of processes that train together each its own; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def load_base(config: Config, *, dequantized: bool = False) -> Base:
    """Load the base of a run, frozen. Safetensors only; no code of the repository is run.

    Args:
        config: the run's.
        dequantized: turn quantised weights back into plain ones of the compute precision.

    Raises:
        InputError: the weights are not on this machine and cannot be fetched, or cannot be read.
    """
    folder, commit = find_model(config.model, config.hub.mirror)
    peft = config.peft
    compute = DTYPES[peft.compute_dtype]
    quantization = None
    if peft.base_precision == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=peft.double_quantization,
            bnb_4bit_compute_dtype=compute,
        )
    dtype = compute if quantization else DTYPES[peft.base_precision]
    model, tokenizer = load_causal_lm(folder, dtype, quantization, config.model.attention)
    if dequantized and quantization:
        model = model.dequantize(dtype=compute)
    keep_quantized_weights(model)
    model.requires_grad_(False)
    files = inventory(folder, identifying_files(folder), Digests())
    name = config.model.hub_id or f"random-{config.model.shape.layers}x{config.model.shape.hidden}"
    source = {"name": name, "commit": commit, "files": files, "digest": digest_of(files)}
    return Base(model, tokenizer, folder, source, dequantized)


def load_causal_lm(
    folder: Path, dtype: torch.dtype, quantization: BitsAndBytesConfig | None, attention: str = "sdpa"
) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer. Safetensors only; no code of the repository is run.

    Raises:
        InputError: they cannot be read.
    """
    check_folder(folder)
    with cannot_be_loaded(folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization,
            attn_implementation=attention,
            device_map={"": device()},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_weights refuses them, by name
        )
        check_weights(folder, found)
        tokenizer = load_tokenizer(folder)
        check_vocabulary(folder, tokenizer, model.get_input_embeddings().weight.shape[0])
    model.eval()
    return model, tokenizer


def check_folder(folder: Path) -> None:
    """Raise InputError for a folder that is no whole model, or not to be used: nothing of it is read then."""
    if faults := model_faults(folder):
        raise InputError(faults)


def check_weights(folder: Path, found: Mapping[str, Any]) -> None:
    """Every weight of the model was in its files: transformers fills in random ones for the others.

    Args:
        folder: of the model.
        found: what from_pretrained says of its loading.

    Raises:
        InputError: some were not, or have another shape.
    """
    if found["mismatched_keys"]:
        name, theirs, ours = sorted(found["mismatched_keys"])[0]
        what = f"{name} is {_shape(theirs)} in its files, and {_shape(ours)} by its config.json"
        raise InputError([Fault(str(folder), what, "its files are not of one model: fetch it again")])
    if absent := sorted(found["missing_keys"]):
        what = f"its files lack {len(absent)} weights that its config.json asks for, {absent[0]} among them"
        raise InputError([Fault(str(folder), what, "they would be random: fetch it again, or another model")])


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


@contextmanager
def cannot_be_loaded(folder: Path) -> Iterator[None]:
    """What libraries raise of a folder that cannot be loaded, as an InputError; running out of memory is none."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library has kinds of its own, for what is wrong in each of the files
        told = (
            f"{error} ({type(error).__name__})" if isinstance(error, (KeyError, TypeError, AttributeError)) else error
        )
        lines = [line.strip() for line in str(told).splitlines() if line.strip()]
        what = f"cannot be loaded: {' '.join(lines[:2])[:300] if lines else type(error).__name__}"
        hint = "no code of a repository is run" if "trust_remote_code" in str(error) else WHOLE
        raise InputError([Fault(str(folder), what, hint)]) from None


def keep_quantized_weights(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place.

    On a CPU with AVX512-bf16, its first forward pass in evaluation mode (0.50, nn/modules.py, Linear4bit.forward) packs
    the weights for a kernel and rounds their scales to bf16, for good: a run would depend on whether something had been
    evaluated before it in the same process.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def identifying_files(folder: Path) -> list[str]:
    """The files that make the model what it is."""
    return sorted({path.name for pattern in IDENTIFYING for path in folder.glob(pattern)})


def find_model(model: Model, mirror: str | None) -> tuple[Path, str | None]:
    """The folder of a model and its commit, fetched or built where it is not there. Raises InputError."""
    found = model_folder(model, mirror)
    if found is not None:
        return found, commit_of(found)
    if model.source == "random":
        return build_random(model.shape), None
    if model.source == "cache":
        raise InputError([missing_from_cache(model)])
    assert model.hub_id is not None
    return find_repository(model.hub_id, model.revision, "model", mirror)


def missing_from_cache(model: Model) -> Fault:
    """What to tell people when a converted model was not made yet."""
    what = f"is not in the cache ({cache_dir() / 'models'})"
    return Fault(str(model.hub_id), what, "make it once with: python scripts/fetch_smollm2.py")


def build_random(shape: Shape) -> Path:
    """A Llama with random weights (seed 0) and a byte-level tokenizer, saved in the cache."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    )
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        initializer_range=0.1,  # larger than usual: logits that differ, so that tests can tell models apart
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return save_to_cache(model, tokenizer, f"random-{short_hash(repr(shape))}", {"built": repr(shape)})


def save_to_cache(model: Any, tokenizer: Any, name: str, note: dict[str, Any]) -> Path:
    """Save a model in the cache under `name`, whole or not at all; another process's copy is kept."""
    target = cache_dir() / "models" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}."))
    try:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "complete.json", note)
        temporary.chmod(0o777 & ~umask())
        sync_tree(temporary)
        try:
            temporary.rename(target)
        except OSError:  # there is one already: whole, or left by a kill
            if not (target / "complete.json").is_file():
                remove_tree(target)
                temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
