"""Adapters: made, continued, saved in plain PEFT format, and taken off again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from peft_align.config.schema import Peft
from peft_align.errors import Fault, InputError
from peft_align.models.loading import DTYPES, Base, cannot_be_loaded
from peft_align.store.records import digest_of, sha256, sync_tree
from peft_align.store.weights import ADAPTER_WEIGHTS, tensors


def new_adapter(base: Base, peft: Peft) -> PeftModel:
    """Put a fresh adapter on the base; seed torch before. Raises InputError if a target module cannot have one."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.r,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        target_modules=list(peft.target_modules),
        bias="none",
    )
    names = {name.rpartition(".")[2] for name, _ in base.model.named_modules()}
    absent = [name for name in peft.target_modules if name not in names]
    if absent:
        what = f"{', '.join(absent)}: the model has no such module"
        raise InputError([Fault("peft.target_modules", what, "see `print(model)` for the names")])
    head = base.model.get_output_embeddings()
    of_head = {name.rpartition(".")[2] for name, module in base.model.named_modules() if module is head}
    if adapted := of_head & set(peft.target_modules):  # TRL 1.16 refuses it too
        what = f"{', '.join(adapted)}: log-probabilities are computed from the head's own weights, without an adapter"
        raise InputError([Fault("peft.target_modules", what, "leave it out")])
    model = get_peft_model(base.model, config, autocast_adapter_dtype=False)
    cast_adapter(model, peft)
    return model


def continue_adapter(base: Base, folder: Path, peft: Peft) -> PeftModel:
    """Put a trainable copy of a saved adapter on the base, with this run's dropout."""
    config = LoraConfig.from_pretrained(folder)
    config.lora_dropout, config.inference_mode = peft.dropout, False
    model = PeftModel.from_pretrained(base.model, folder, is_trainable=True, config=config, autocast_adapter_dtype=True)
    cast_adapter(model, peft)
    return model


def cast_adapter(model: PeftModel, peft: Peft) -> None:
    """Hold the adapter's weights in the precision asked for; trainers have opinions of their own about that."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(DTYPES[peft.adapter_dtype])


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of the trainable weights by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore_adapter(model: PeftModel, weights: dict[str, torch.Tensor], peft: Peft) -> None:
    """Undo what a trainer's constructor did: TRL rounds the adapter to bf16 on a quantised base, not on others."""
    cast_adapter(model, peft)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def trainable_parameters(model: PeftModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def settle_config(folder: Path, base_name: str) -> None:
    """Write adapter_config.json as every process and machine does."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name  # not the folder of this machine
    config["target_modules"] = sorted(config["target_modules"])  # PEFT has a set: its order is another in each process
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_adapter(model: PeftModel, folder: Path, base_name: str) -> dict[str, Any]:
    """Save the trained adapter alone (not a reference beside it) and return its files and digest."""
    model.save_pretrained(
        str(folder), selected_adapters=["default"], safe_serialization=True, save_embedding_layers=False
    )
    settle_config(folder, base_name)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    sync_tree(folder)
    names = sorted(p.name for p in folder.iterdir())
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    return {"files": files, "digest": digest_of(files)}


def _check_loaded(model: PeftModel, folder: Path) -> None:
    """Every weight of the adapter came from its file: PEFT only warns of those that did not."""
    absent = sorted(set(get_peft_model_state_dict(model)) - set(tensors(folder / ADAPTER_WEIGHTS)))
    if absent:
        what = f"lacks {len(absent)} weights of the adapter that its config describes, {absent[0]} among them"
        raise InputError([Fault(str(folder), what, "its files are not of one adapter, or it is of another model")])


@contextmanager
def loaded_adapter(base: Base, folder: Path | None) -> Iterator[Any]:
    """The base with a saved adapter on it for evaluation, or the bare base; the base is as before afterwards."""
    if folder is None:
        yield base.model
        return
    # Without autocast_adapter_dtype, PEFT would round the adapter to the precision of a bf16 base (not of an nf4 one).
    with cannot_be_loaded(folder):
        model = PeftModel.from_pretrained(base.model, folder, is_trainable=False, autocast_adapter_dtype=True)
        _check_loaded(model, folder)
    model.eval()
    try:
        yield model
    finally:
        take_off(base, model)


def take_off(base: Base, model: PeftModel) -> None:
    """Give the base back as it was loaded: no adapter, no trainer's forward, frozen, in evaluation mode."""
    model.unload()
    for leftover in ("forward", "peft_config", "_hf_peft_config_loaded"):
        base.model.__dict__.pop(leftover, None)
    if base.model.is_activation_checkpointing:
        base.model.gradient_checkpointing_disable()
    base.model.disable_input_require_grads() if hasattr(base.model, "_require_grads_hook") else None
    base.model.requires_grad_(False)
    base.model.eval()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
