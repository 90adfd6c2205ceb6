"""Names a run after its science: a readable slug and 12 hex digits of the hash of its scientific config.

Hashed are the fully resolved scientific fields, not the differences from a default, so that neither a changed default
nor another way to write the same values gives an old result a new meaning. Operational fields are never hashed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from peft_align.config.compose import Built, scientific
from peft_align.config.schema import MAIN_AXES, TRAINING_GROUPS, Config, Model, Peft

BASE_FIELDS = ("base_precision", "double_quantization", "compute_dtype")


def train_id(config: Config, parts: Mapping[str, Built], choices: Mapping[str, str], parents: Sequence[str]) -> str:
    """The id of a training run.

    Args:
        config: the run's checked config.
        parts: its groups, with their canonical texts.
        choices: the option of each group, for the slug.
        parents: ids of the runs whose products it starts from, in order.
    """
    canonical = {group: parts[group].canonical for group in TRAINING_GROUPS}
    canonical["model"] = json.dumps(model_identity(config.model), sort_keys=True, separators=(",", ":"))
    text = "\n".join(["train", *(f"{g} {c}" for g, c in canonical.items()), f"seed {config.seed}", *parents])
    names = [choices[group] for group in MAIN_AXES]
    if parents:
        names[2] = f"sft_{names[2]}"
    return f"{slug([*names, f's{config.seed}'])}-{short_hash(text)}"


def model_identity(model: Model) -> dict[str, object]:
    """The scientific fields of a model; of one that is built on the spot, its shape too, for it is the model."""
    shape = {"shape": dict(vars(model.shape))} if model.source == "random" else {}
    return scientific(type(model), model) | shape


@dataclasses.dataclass(frozen=True)
class Precision:
    """The fields of Peft that a base has, with or without an adapter on it."""

    base_precision: str
    double_quantization: bool
    compute_dtype: str


def base_identity(model: Model, peft: Peft | Precision) -> dict[str, object]:
    """What makes an unaligned base: the model and the precision it is held in."""
    return {
        "model": model_identity(model),
        "precision": {name: getattr(peft, name) for name in BASE_FIELDS},
    }


def evaluated_on(peft: Peft, base_precision: str | None) -> Precision:
    """The precision of the base that is evaluated; None: that which was trained on."""
    if base_precision is None or base_precision == peft.base_precision:
        return Precision(*(getattr(peft, name) for name in BASE_FIELDS))
    quantized = base_precision == "nf4"
    compute = peft.compute_dtype if quantized else base_precision
    return Precision(base_precision, quantized, compute)


def on_base(peft: Peft, base: Precision) -> Peft:
    """The settings with another base."""
    return dataclasses.replace(peft, **dataclasses.asdict(base))


def baseline_id(config: Config, choices: Mapping[str, str]) -> str:
    """The id of an unaligned base at one precision."""
    text = "baseline\n" + json.dumps(base_identity(config.model, config.peft), sort_keys=True)
    return f"{slug(['baseline', choices['model'], base_label(config.peft)])}-{short_hash(text)}"


def merge_id(config: Config, merge: Built, names: Sequence[str], inputs: Sequence[str]) -> str:
    """The id of a merge.

    Args:
        config: for the seed; the inputs' own ids tell the model, its precision and all of their training.
        merge: the merge's config.
        names: words for the slug.
        inputs: ids of the merged runs, in order.
    """
    text = "\n".join(["merge", merge.canonical, f"seed {config.seed}", *inputs])
    return f"{slug(['merge', *names, f's{config.seed}'])}-{short_hash(text)}"


def base_label(peft: Peft | Precision) -> str:
    """How tables name the precision of a base: its storage, and the compute precision where it is another."""
    same = peft.base_precision == peft.compute_dtype or (peft.base_precision, peft.compute_dtype) == ("nf4", "bf16")
    return peft.base_precision if same else f"{peft.base_precision}_{peft.compute_dtype}"


def slug(words: Sequence[str]) -> str:
    """Words joined to a safe folder name: letters, digits, '_', '-', at most 100 characters, none that is an option."""
    return re.sub(r"[^A-Za-z0-9_-]+|^-", "_", "-".join(words))[:100]


def short_hash(text: str, digits: int = 12) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
