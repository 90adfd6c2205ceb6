"""Tokenizers that are loaded from a bare SentencePiece model."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from peft_align.errors import InputError
from peft_align.models.tokenizer import PROBE, load_tokenizer


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A model folder with a SentencePiece model and no tokenizer.json."""
    vocabulary = Path(str(import_module("mistral_common").__file__)).parent / "data" / "tokenizer.model.v1"
    shutil.copy(vocabulary, tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": True}))
    return tmp_path


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_runs_of_blanks_are_split_as_sentencepiece_does(bare: Path, model_type: str) -> None:
    (bare / "config.json").write_text(json.dumps({"model_type": model_type}))
    own = import_module("sentencepiece").SentencePieceProcessor(model_file=str(bare / "tokenizer.model"))
    tokenizer = load_tokenizer(bare)
    for text in (PROBE, "a  b", "   four\n\n    blanks", "def f():\n        return  1"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_that_splits_otherwise_is_refused_rather_than_used(bare: Path) -> None:
    (bare / "config.json").write_text('{"model_type": "llama"}')
    path = bare / "tokenizer_config.json"
    added = {"32000": {"content": "naïve", "special": False, "normalized": False, "lstrip": False, "rstrip": False}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(bare)
