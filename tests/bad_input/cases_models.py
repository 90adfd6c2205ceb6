"""Folders of models and of adapters: what is missing, cut off, pickled, of other shapes, or of another model."""

from __future__ import annotations

import functools
import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bad_input import FAILED, REFUSED, Case, write

SETTINGS = ("dataset=everyday", "peft=lora", "train.max_steps=1", "train.batch_size=2", "train.max_length=64")
LAYER = "base_model.model.model.layers.{}.self_attn.q_proj"
Damage = Callable[[Path], object]


@functools.cache
def _tiny() -> Path:
    from peft_align.config.schema import Shape
    from peft_align.models.loading import build_random

    return build_random(Shape(2, 32, 4, 2, 64, 259, True))


def model(name: str, damage: Damage, *told: str, code: int = FAILED, words: Sequence[str] = ()) -> Case:
    """A small Llama's folder with something wrong in it, that a run is trained on."""

    def prepare(folder: Path) -> list[str]:
        shutil.copytree(_tiny(), folder / "model")
        (folder / "model/complete.json").unlink()
        damage(folder / "model")
        asked = ("model=tiny", "model.source=hub", f"model.hub_id={folder / 'model'}")
        return ["train", *asked, *SETTINGS, *words]

    return Case("models", name, prepare, told, code)


def edit(name: str, **values: Any) -> Damage:
    """Other values in a JSON file; None takes a key away."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8")) | values
        content = {key: value for key, value in content.items() if value is not None}
        write(folder / name, json.dumps(content))

    return damage


def without(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def with_file(name: str, content: str | bytes) -> Damage:
    return lambda folder: write(folder / name, content)


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        write(folder / name, content[: int(len(content) * share)])

    return damage


def safetensors(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    """A file of zeros in fp32 of these shapes."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 4 * functools.reduce(int.__mul__, shape, 1)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def lacking_a_weight(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def of_more_tokens(folder: Path) -> None:
    """The tokenizer of a model with a larger vocabulary."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"more{i}": len(vocabulary) + i for i in range(40)}
    write(folder / "tokenizer.json", json.dumps(content))


def endless(folder: Path) -> None:
    """No token that ends a text."""
    edit("tokenizer_config.json", eos_token=None)(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}})
MODELS = [
    model("no config.json", without("config.json"), "model: has no config.json", "save_pretrained", code=REFUSED),
    model("config.json that is not JSON", with_file("config.json", "{"), "config.json: is not JSON", code=REFUSED),
    model("config.json that is a list", with_file("config.json", "[]"), "config.json: a JSON object", code=REFUSED),
    model("config.json of no model", with_file("config.json", "{}"), "config.json: names no model_type", code=REFUSED),
    model("no weights", without("model.safetensors"), "model: has no *.safetensors", code=REFUSED),
    model("weights that are pickled", pickled, "has no *.safetensors", "never read here: convert", code=REFUSED),
    model(
        "weights that are cut off",
        cut("model.safetensors", 0.5),
        "model.safetensors: is cut off: it has",
        "fetch it again",
        code=REFUSED,
    ),
    model(
        "weights that are cut off in their header",
        cut("model.safetensors", 0.0005),
        "model.safetensors: is no safetensors file, or cut off in its header",
        code=REFUSED,
    ),
    model(
        "weights that are a page of HTML",
        with_file("model.safetensors", "<html>404</html>"),
        "is no safetensors",
        code=REFUSED,
    ),
    model(
        "weights that are a pointer of git",
        with_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 14000\n"),
        "is no safetensors file",
        code=REFUSED,
    ),
    model(
        "weights of which a file is missing",
        with_file("model.safetensors.index.json", INDEX),
        "has no model-00001-of-00002.safetensors (1 of 2 files are missing)",
        code=REFUSED,
    ),
    model("no tokenizer", without("tokenizer.json"), "model: has no tokenizer", code=REFUSED),
    model("tokenizer that is not JSON", with_file("tokenizer.json", "{"), "model: cannot be loaded"),
    model(
        "unknown architecture",
        edit("config.json", model_type="lama", architectures=["LamaForCausalLM"]),
        "cannot be loaded",
        "lama",
    ),
    model(
        "architecture that is none for text",
        edit("config.json", model_type="vit", architectures=["ViTModel"]),
        "cannot be loaded",
    ),
    model(
        "code of the repository's own",
        lambda folder: (
            edit(
                "config.json",
                model_type="mine",
                auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
            )(folder),
            write(folder / "mine.py", "raise SystemExit('run')"),
        ),
        "cannot be loaded",
        "no code of a repository is run",
    ),
    model("weights of another shape", edit("config.json", hidden_size=48), "32", "48", "not of one model"),
    model(
        "weights that are not all there",
        lacking_a_weight,
        "lack 1 weights",
        "layers.1.mlp.up_proj.weight",
        "they would be random",
    ),
    model("more layers than weights", edit("config.json", num_hidden_layers=3), "layers.2", "they would be random"),
    model("heads that do not divide", edit("config.json", num_attention_heads=5), "cannot be loaded"),
    model(
        "tokenizer of another vocabulary",
        of_more_tokens,
        "its tokenizer: has 40 tokens that the model has no embedding for",
        "'more0' is 259",
    ),
    model("no token that ends a text", endless, "its tokenizer: has no end-of-sequence token", "eos_token"),
    model(
        "no chat template",
        lambda folder: None,
        "model.template",
        "has no chat template",
        "vicuna or mistral",
        words=["model.template=chat"],
    ),
    model(
        "chat template that refuses",
        with_file("chat_template.jinja", "{{ raise_exception('no system') }}"),
        "chat template cannot be used: no system",
        words=["model.template=chat"],
    ),
    model(
        "chat template that is broken",
        with_file("chat_template.jinja", "{% for m in messages %}"),
        "chat template cannot be used",
        words=["model.template=chat"],
    ),
    model(
        "module that is not there",
        lambda folder: None,
        "peft.target_modules: q_prj: the model has no such module",
        words=["peft.target_modules=[q_prj]"],
    ),
    model(
        "adapter on the head",
        lambda folder: None,
        "peft.target_modules: lm_head",
        "leave it out",
        words=["peft.target_modules=[q_proj,lm_head]"],
    ),
]


def adapter_files(rank: int = 4, hidden: int = 32, layers: int = 2, **config: Any) -> dict[str, str | bytes]:
    """An adapter of q_proj as PEFT saves it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        shapes[f"{LAYER.format(i)}.lora_A.weight"] = (rank, hidden)
        shapes[f"{LAYER.format(i)}.lora_B.weight"] = (hidden, rank)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
                "base_model_name_or_path": "me/base", **config}  # fmt: skip
    kept = {key: value for key, value in settings.items() if value is not None}
    return {"adapter_config.json": json.dumps(kept), "adapter_model.safetensors": safetensors(shapes)}


def adapter(name: str, files: Mapping[str, str | bytes], *told: str, code: int = REFUSED) -> Case:
    """An adapter's folder that is evaluated."""

    def prepare(folder: Path) -> list[str]:
        (folder / "mine").mkdir()
        for path, content in files.items():
            write(folder / "mine" / path, content)
        settings = ("model=tiny", *SETTINGS, "evaluation.benchmarks=[preference]", "evaluation.heldout=2")
        return ["evaluate", *settings, "launcher=debug", "adapter=mine"]

    return Case("models", f"adapter: {name}", prepare, told, code)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOOD = adapter_files()
ADAPTERS = [
    adapter("empty folder", {}, f"adapter=mine: has no {CONFIG} and no {WEIGHTS}", "save_pretrained"),
    adapter("no config", {WEIGHTS: GOOD[WEIGHTS]}, f"adapter=mine: has no {CONFIG}"),
    adapter("no weights", {CONFIG: GOOD[CONFIG]}, f"adapter=mine: has no {WEIGHTS}"),
    adapter(
        "weights that are pickled",
        {CONFIG: GOOD[CONFIG], "adapter_model.bin": b"PK"},
        f"has no {WEIGHTS}",
        "never read here: convert",
    ),
    adapter("config that is not JSON", GOOD | {CONFIG: "{"}, f"{CONFIG}: is not JSON"),
    adapter("config that is a list", GOOD | {CONFIG: "[]"}, f"{CONFIG}: a JSON object is expected"),
    adapter("config of no kind", adapter_files(peft_type=None), f"{CONFIG}: names no peft_type"),
    adapter("config without a rank", adapter_files(r=None), f"{CONFIG}: r is null"),
    adapter("config whose rank is text", adapter_files(r="4"), f'{CONFIG}: r is "4"'),
    adapter("weights of another rank", adapter_files(rank=8), "has rank 8", "says r=4", "not of one adapter"),
    adapter("weights that are cut off", GOOD | {WEIGHTS: bytes(GOOD[WEIGHTS][:-40])}, "is cut off"),  # type: ignore[arg-type]
    adapter("config of an unknown kind", adapter_files(peft_type="LORRA"), "cannot be loaded", code=FAILED),
    adapter("adapter of a wider model", adapter_files(hidden=48), "cannot be loaded", "48", code=FAILED),
    adapter(
        "weights that are not all there",
        adapter_files(layers=1),
        "lacks 2 weights of the adapter",
        "layers.1.self_attn.q_proj",
        code=FAILED,
    ),
    adapter(
        "modules that are not there", adapter_files(target_modules=["q_prj"]), "cannot be loaded", "q_prj", code=FAILED
    ),
]

CASES = [*MODELS, *ADAPTERS]
