"""The four 7B models of the study: real module names at a tiny width are trained, real widths are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sweeping import expand, trained
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from peft_align.config.schema import Model, Shape
from peft_align.grid.cost import adapter_parameters, base_parameters
from peft_align.models.loading import find_model
from peft_align.store.records import read_json

SEVEN_B = {"llama_7b": "llama", "vicuna_7b": "llama", "mistral_7b": "mistral", "mistral_7b_instruct": "mistral"}
TINY = Shape(layers=2, hidden=32, heads=4, kv_heads=2, ffn=64, vocabulary=259, tied=False)


def architecture(kind: str, shape: Shape) -> Any:
    """A config of the real architecture."""
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "tie_word_embeddings": shape.tied,
    }
    return LlamaConfig(**sizes) if kind == "llama" else MistralConfig(**sizes, sliding_window=4096)


@pytest.fixture(scope="module")
def tiny_mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror whose 7B models are random ones of a tiny width."""
    folder = tmp_path_factory.mktemp("mirror")
    of_bytes = Model("random", None, None, "vicuna", Shape(2, 32, 4, 2, 64, 259, True))
    tokenizer = AutoTokenizer.from_pretrained(find_model(of_bytes, None)[0])
    for option, kind in SEVEN_B.items():
        config = architecture(kind, TINY)
        model = LlamaForCausalLM(config) if kind == "llama" else MistralForCausalLM(config)
        place = folder / str(trained(expand(f"model={option}"))[0].config.model.hub_id)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return folder


@pytest.mark.slow
def test_each_model_of_the_study_trains_at_its_real_module_names(verb: Any, tmp_path: Path, tiny_mirror: Path) -> None:
    shape = [f"model.shape.{name}={getattr(TINY, name)}" for name in ("layers", "hidden", "heads", "kv_heads", "ffn")]
    words = (
        f"model={','.join(SEVEN_B)}", "method=sft,dpo", "dataset=everyday", f"hub.mirror={tiny_mirror}",
        "train.max_steps=1", "train.batch_size=2", "train.max_length=200", "evaluation.benchmarks=[preference]",
        "evaluation.heldout=2", *shape,
    )  # fmt: skip
    done = verb("sweep", *words, check=True)
    assert done.returncode == 0
    runs = trained(expand(*words))
    assert len(runs) == 8
    for run in runs:
        folder = tmp_path / "outputs/runs" / run.id
        record = read_json(folder / "train.json")
        assert record is not None
        assert record["trainable_parameters"] == adapter_parameters(run)
        assert f"trainable parameters: {adapter_parameters(run):,}" in (folder / "train.log").read_text()


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("option", SEVEN_B)
def test_the_closed_formula_counts_what_peft_makes_of_the_real_shape(option: str, method: str) -> None:
    run = trained(expand(f"model={option}", f"method={method}"))[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(SEVEN_B[option], run.config.model.shape))
        assert base_parameters(run.config.model.shape) == sum(p.numel() for p in model.parameters())
        lora = LoraConfig(r=run.config.peft.r, target_modules=run.config.peft.target_modules)
        adapted = get_peft_model(model, lora)
    assert adapter_parameters(run) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
