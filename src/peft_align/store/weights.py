"""What a folder of a model or an adapter must hold, looked at without torch: names, headers, sizes. No weight is read.

It is looked at before anything starts, so that a cut download or a pickle is told in seconds, not after a queue.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_align.errors import Fault

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")
LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it
PICKLED = "its weights are pickled, which is never read here: convert them to safetensors"
WHOLE = "a model's folder has config.json, *.safetensors and its tokenizer's files, as save_pretrained writes them"
AGAIN = "fetch it again"


def model_faults(folder: Path) -> list[Fault]:
    """What is missing or damaged in a model's folder, or not to be used, as far as can be seen without loading it.

    transformers would put an adapter that lies there on the model, and take another model for the base that it names.
    """
    faults: list[Fault] = []
    if (folder / ADAPTER_CONFIG).is_file():
        hint = "score it with adapter=FOLDER, or merge it into its base"
        faults.append(Fault(str(folder), f"holds an adapter ({ADAPTER_CONFIG}), not a model alone", hint))
    config = _json(folder / CONFIG, faults, WHOLE)
    if config is not None and not (config.get("model_type") or config.get("architectures")):
        faults.append(Fault(str(folder / CONFIG), "names no model_type", WHOLE))
    faults += _weight_faults(folder)
    if not any(any(folder.glob(name)) for name in TOKENIZERS):
        faults.append(Fault(str(folder), "has no tokenizer", WHOLE))
    return faults


def _weight_faults(folder: Path) -> Iterator[Fault]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        hint = PICKLED if any(any(folder.glob(name)) for name in PICKLES) else WHOLE
        yield Fault(str(folder), "has no *.safetensors", hint)
    for path in shards:
        try:
            tensors(path)
        except ValueError as error:
            yield Fault(str(path), str(error), AGAIN)
    if (folder / INDEX).is_file():
        faults: list[Fault] = []
        index = _json(folder / INDEX, faults, AGAIN) or {}
        yield from faults
        listed = index.get("weight_map")
        names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            yield Fault(str(folder), f"has no {absent[0]} ({len(absent)} of {len(names)} files are missing)", AGAIN)


def adapter_faults(folder: Path, where: str) -> list[Fault]:
    """What is missing, damaged or not to be used in an adapter's folder.

    Args:
        folder: in PEFT's format.
        where: what the user named it by.
    """
    absent = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if absent:
        pickled = (folder / "adapter_model.bin").is_file() and ADAPTER_WEIGHTS in absent
        hint = PICKLED if pickled else "an adapter's folder has both, as PEFT's save_pretrained writes them"
        return [Fault(where, f"has no {' and no '.join(absent)}", hint)]
    faults: list[Fault] = []
    config = _json(folder / ADAPTER_CONFIG, faults, AGAIN)
    shapes: dict[str, list[int]] = {}
    try:
        shapes = tensors(folder / ADAPTER_WEIGHTS)
    except ValueError as error:
        faults.append(Fault(str(folder / ADAPTER_WEIGHTS), str(error), AGAIN))
    if config is None or faults:
        return faults
    at = str(folder / ADAPTER_CONFIG)
    if not isinstance(config.get("peft_type"), str):
        return [Fault(at, "names no peft_type, so it is no adapter of PEFT", "e.g. LORA, with r and lora_alpha")]
    if config["peft_type"] != "LORA":
        return []
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        return [
            Fault(at, f"r is {json.dumps(rank)}, not a whole number from 1", "give the rank that it was trained with")
        ]
    patterned = bool(config.get("rank_pattern"))
    odd = [name for name, shape in shapes.items() if name.endswith("lora_A.weight") and shape[:1] != [rank]]
    if odd and not patterned:
        what = f"{odd[0]} has rank {shapes[odd[0]][0]}, and {ADAPTER_CONFIG} says r={rank}"
        return [Fault(where, what, "its two files are not of one adapter")]
    return []


def tensors(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a safetensors file, from its header. Raises ValueError, saying what is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise ValueError("is no safetensors file, or cut off in its header")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            shapes = {name: [int(n) for n in entry["shape"]] for name, entry in entries.items()}
        except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError):
            raise ValueError("is no safetensors file: its header cannot be read") from None
    if 8 + length + end != size:
        raise ValueError(
            f"is cut off: it has {size:,} bytes of {8 + length + end:,}"
            if 8 + length + end > size
            else f"has {size:,} bytes, and its header says {8 + length + end:,}"
        )
    return shapes


def _json(path: Path, faults: list[Fault], hint: str) -> dict[str, Any] | None:
    """A JSON object; adds a fault if there is none."""
    if not path.is_file():
        faults.append(Fault(str(path.parent), f"has no {path.name}", hint))
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        faults.append(Fault(str(path), f"is not JSON: {str(error)[:200]}", AGAIN))
        return None
    if not isinstance(found, dict):
        faults.append(Fault(str(path), "a JSON object is expected", hint))
        return None
    return found
