"""Loads a tokenizer, and makes sure that it splits text as the repository's own SentencePiece model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peft_align.errors import Fault, InputError

PROBE = "  Hello  world,\n\n  a   test: naïve 123 ... ASSISTANT: yes."  # runs of blanks are what conversions get wrong


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, with a padding token.

    Raises:
        InputError: the folder has only a SentencePiece model, and what is loaded splits text in another way; or there
            is no token that ends a text.
        OSError, ValueError, KeyError: as transformers does, when there is none that can be read.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        _follow_sentencepiece(tokenizer, folder / "tokenizer.model")
    if tokenizer.eos_token_id is None:
        what, hint = "has no end-of-sequence token", "name one as eos_token in tokenizer_config.json"
        raise InputError([Fault(f"{folder}: its tokenizer", what, hint)])
    if tokenizer.pad_token is None:
        # Padding is always masked, so any token serves; LLaMA and Mistral have none of their own.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(folder: Path, tokenizer: Any, rows: int) -> None:
    """The model has an embedding for each token of its tokenizer. A token for padding alone may be beyond: it is none.

    Args:
        folder: of both.
        tokenizer: as loaded; its padding token becomes the end token where the model has none.
        rows: of the model's embeddings.

    Raises:
        InputError: a text could hold a token that the model does not know.
    """
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if tokenizer.pad_token in beyond and tokenizer.pad_token != tokenizer.eos_token:
        del beyond[tokenizer.pad_token]
        tokenizer.pad_token = tokenizer.eos_token
    if beyond:
        token, i = min(beyond.items(), key=lambda entry: entry[1])
        what = f"has {len(beyond)} tokens that the model has no embedding for ({token!r} is {i}, of {rows} rows)"
        raise InputError([Fault(f"{folder}: its tokenizer", what, "put the tokenizer of this very model there")])


def _follow_sentencepiece(tokenizer: Any, model: Path) -> None:
    """Put the merges in the order of their scores, and a blank in front of every text.

    transformers 5.23 orders the merges that it reads from a bare tokenizer.model by the ids of their tokens, so that
    LLaMA-1's runs of blanks, for one, become other tokens than those the model was trained on; and it leaves out the
    blank in front of a text that begins with one.
    """
    import sentencepiece
    from tokenizers import models, normalizers

    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    names = [own.id_to_piece(i) for i in range(len(own))]
    vocabulary = {name: i for i, name in enumerate(names)}
    ordinary = [i for i in range(len(own)) if not (own.is_control(i) or own.is_unknown(i) or own.is_byte(i))]
    merges = [
        (names[i][:cut], names[i][cut:])
        for i in sorted(ordinary, key=lambda i: -own.get_score(i))
        for cut in range(1, len(names[i]))
        if names[i][:cut] in vocabulary and names[i][cut:] in vocabulary
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.model, models.BPE):
        backend.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != own.encode(PROBE):
        what = "gives other tokens than the SentencePiece model beside it, and there is no tokenizer.json"
        raise InputError([Fault(str(model.parent), what, "put the repository's tokenizer.json there")])
