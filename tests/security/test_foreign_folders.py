"""Models, adapters and data of others: read as weights and texts, refused where they cannot be, never run."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeping import expand, trained
from transformers import LlamaForSequenceClassification

from peft_align.config.judges import Classifier
from peft_align.config.schema import Dataset, Preference
from peft_align.data.pairs import Message
from peft_align.data.sources import load_split
from peft_align.data.templates import chat
from peft_align.errors import InputError
from peft_align.evaluation.local_judges import classifier
from peft_align.evaluation.texts import read_rows
from peft_align.grid.external import find_adapter
from peft_align.models.adapters import loaded_adapter, new_adapter, save_adapter, take_off
from peft_align.models.loading import Base, build_random, load_base, load_causal_lm

CONFIG = trained(expand("model=tiny", "dataset=everyday", "peft=lora"))[0].config


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


@pytest.fixture
def sung(tmp_path: Path) -> Path:
    """The file that is there if code of a folder was run."""
    return tmp_path / "sung"


@pytest.fixture
def model(tmp_path: Path, sung: Path) -> Path:
    """A model's folder with code in every place where a library may look for some."""
    folder = tmp_path / "model"
    shutil.copytree(build_random(CONFIG.model.shape), folder)
    code = f"import pathlib\npathlib.Path({str(sung)!r}).touch()\nfrom transformers import *\n"
    kinds = {"": "LlamaForCausalLM", "Config": "LlamaConfig", "Tokenizer": "PreTrainedTokenizerFast"}
    code += "".join(f"class Evil{name}({parent}): pass\n" for name, parent in kinds.items())
    for name in (
        "modeling_evil.py",
        "configuration_evil.py",
        "tokenization_evil.py",
        "__init__.py",
        "setup.py",
        "conftest.py",
    ):
        (folder / name).write_text(code, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(*a, **k): pass\n", encoding="utf-8")
    classes = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    auto = {"AutoConfig": "configuration_evil.EvilConfig", **dict.fromkeys(classes, "modeling_evil.Evil")}
    change(folder / "config.json", auto_map=auto)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]})
    pickle_to(folder / "training_args.bin", sung)
    pickle_to(folder / "pytorch_model.bin", sung)
    return folder


def change(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | more), encoding="utf-8")


def pickle_to(path: Path, sung: Path) -> None:
    path.write_bytes(pickle.dumps(Canary(sung)))


def test_the_canary_sings_where_a_pickle_is_read(tmp_path: Path, sung: Path) -> None:
    pickle_to(tmp_path / "x.bin", sung)
    pickle.loads((tmp_path / "x.bin").read_bytes())
    assert sung.exists()


def test_code_in_a_models_folder_is_not_run(model: Path, sung: Path) -> None:
    loaded, tokenizer = load_causal_lm(model, torch.float32, None)
    loaded.generate(tokenizer("a", return_tensors="pt")["input_ids"], max_new_tokens=1, pad_token_id=0)
    assert type(loaded).__module__.startswith("transformers.")
    assert not sung.exists()


def test_a_model_that_is_nothing_without_its_code_is_refused_with_a_message(model: Path, sung: Path) -> None:
    change(model / "config.json", model_type="evil", architectures=["Evil"])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_causal_lm(model, torch.float32, None)
    with pytest.raises(InputError, match="cannot be loaded"):
        classifier(judge(model), None)
    assert not sung.exists()


def judge(folder: Path) -> Classifier:
    return Classifier("classifier", str(folder), None, None, True, 64, "fp32", 2)


def test_code_in_a_judges_folder_is_not_run(model: Path, sung: Path) -> None:
    auto = json.loads((model / "config.json").read_text(encoding="utf-8"))["auto_map"]
    change(model / "config.json", num_labels=1, id2label={"0": "x"}, label2id={"x": 0}, pad_token_id=0)
    LlamaForSequenceClassification.from_pretrained(model, use_safetensors=True).save_pretrained(model)
    change(model / "config.json", auto_map=auto)
    assert len(classifier(judge(model), None)(["a text"])) == 1
    assert not sung.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_alone_are_refused_with_a_message(model: Path, sung: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").rename(model / name)
    for load in (lambda: load_causal_lm(model, torch.float32, None), lambda: classifier(judge(model), None)):
        with pytest.raises(InputError, match=r"has no \*\.safetensors .*pickled, which is never read"):
            load()
    assert not sung.exists()


def test_an_index_that_names_pickles_is_not_followed(model: Path, sung: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (model / name).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_causal_lm(model, torch.float32, None)
    assert not sung.exists()


def test_a_models_folder_with_an_adapter_in_it_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}), encoding="utf-8")
    for load in (lambda: load_causal_lm(model, torch.float32, None), lambda: classifier(judge(model), None)):
        with pytest.raises(InputError, match="holds an adapter"):
            load()


TEMPLATES = {
    "imports": "{{ cycler.__init__.__globals__.os.system('touch SUNG') }}",
    "climbs": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}",
    "changes": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "formats": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_is_held_in_a_sandbox(template: str, sung: Path) -> None:
    _, tokenizer = load_causal_lm(build_random(CONFIG.model.shape), torch.float32, None)
    tokenizer.chat_template = template.replace("SUNG", str(sung))
    with pytest.raises(Exception, match=r"(?i)unsafe|access to attribute") as caught:
        chat([Message("user", "hello")], tokenizer)
    assert isinstance(caught.value, InputError)
    assert not sung.exists()


@pytest.fixture
def base() -> Base:
    return load_base(CONFIG)


@pytest.fixture
def adapter(tmp_path: Path, sung: Path, base: Base) -> Path:
    folder = tmp_path / "adapter"
    model = new_adapter(base, CONFIG.peft)
    save_adapter(model, folder, "tiny")
    take_off(base, model)
    pickle_to(folder / "adapter_model.bin", sung)
    return folder


def test_an_adapter_without_safetensors_is_refused_with_a_message(adapter: Path, sung: Path) -> None:
    assert find_adapter(str(adapter), None) == adapter
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="pickled, which is never read"):
        find_adapter(str(adapter), None)
    assert not sung.exists()


@pytest.mark.parametrize(
    "more",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"}},
        {"megatron_config": {"a": 1}, "megatron_core": "evil_module"},
        {"megatron_config": {"a": 1}, "megatron_core": "evil_module.core"},
    ],
)
def test_an_adapters_config_that_names_a_module_imports_none(
    adapter: Path, base: Base, sung: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    package = tmp_path / "path" / "evil_module"
    package.mkdir(parents=True)
    for name in ("__init__.py", "core.py"):
        (package / name).write_text(f"import pathlib; pathlib.Path({str(sung)!r}).touch()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    change(adapter / "adapter_config.json", **more)
    with suppress(InputError), loaded_adapter(base, adapter):  # PEFT refuses modules that it does not know
        pass
    assert "evil_module" not in sys.modules
    assert not sung.exists()


# --- Data

ROW = {
    "prompt": "Q?", "response_0": "A.", "response_1": "B.", "is_response_0_safe": True, "is_response_1_safe": False,
    "better_response_id": 0, "safer_response_id": 0,
}  # fmt: skip
DATASET = Dataset("beavertails", "Org/data", None, 0.0)
HARMLESS = Preference("harmless")


def mirror_with(tmp_path: Path, card: str = "") -> tuple[Path, Path]:
    """A mirror and the folder of a dataset in it."""
    folder = tmp_path / "mirror" / "Org" / "data"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text((json.dumps(ROW) + "\n") * 4, encoding="utf-8")
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{card}---\n", encoding="utf-8"
    )
    return tmp_path / "mirror", folder


TRAIN = '  - split: train\n    path: "train.jsonl"\n'


def test_code_beside_data_is_not_run(tmp_path: Path, sung: Path) -> None:
    mirror, folder = mirror_with(tmp_path, TRAIN)
    for name in ("data.py", "Org.py", "__init__.py"):
        (folder / name).write_text(f"import pathlib; pathlib.Path({str(sung)!r}).touch()\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot be read: .*script"):
        load_split(DATASET, HARMLESS, "train", str(mirror))
    (folder / "README.md").unlink()
    with pytest.raises(InputError, match=r"cannot be read: .*script"):
        read_rows("Org/data", None, "train", str(mirror))
    assert not sung.exists()


def test_pickles_are_no_data(tmp_path: Path, sung: Path) -> None:
    mirror, folder = mirror_with(tmp_path, '  - split: train\n    path: "train.pkl"\n')
    pickle_to(folder / "train.pkl", sung)
    (folder / "train.jsonl").unlink()
    with pytest.raises(InputError):
        load_split(DATASET, HARMLESS, "train", str(mirror))
    assert not sung.exists()


@pytest.mark.parametrize("place", ["../../../secret.jsonl", "{tmp_path}/secret.jsonl"])
def test_a_card_that_names_files_of_this_machine_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "secret.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    path = place.format(tmp_path=tmp_path)
    mirror, _ = mirror_with(tmp_path, f'  - split: train\n    path: "{path}"\n')
    for read in (
        lambda: load_split(DATASET, HARMLESS, "train", str(mirror)),
        lambda: read_rows("Org/data", None, "train", str(mirror)),
    ):
        with pytest.raises(InputError, match=r"outside of it|cannot be read"):
            read()
