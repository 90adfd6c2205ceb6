"""Templates and token ids equal those of others: mistral-common's v1 encoding, and FastChat's `vicuna_v1.1`.

Both sides are given the same 200 real dialogues, as our loaders clean them, single-turn and multi-turn. The vocabulary
is Mistral 7B v0.1's SentencePiece model, which mistral-common ships; LLaMA-1's tokenizer is the same algorithm on
another vocabulary. Our side reads it through a folder as the hub has it and `load_tokenizer`, as a run does.
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from peft_align.config.schema import Dataset, Preference
from peft_align.data.pairs import Message, Pair
from peft_align.data.sources import load_split
from peft_align.data.templates import render
from peft_align.data.tokenization import TokenizedPair, tokenize
from peft_align.models.tokenizer import load_tokenizer

HH = Dataset("hh_rlhf", "Anthropic/hh-rlhf", None, 0.0, None)
PKU = Dataset("beavertails", "PKU-Alignment/PKU-SafeRLHF", "v0", 0.0, None)
WHOLE = 10**6  # tokens; longer than any dialogue
BOS, EOS = 1, 2
# How transformers reads a folder: of a `mistral`, tokenizer.json is taken as it is; of a `llama`, a tokenizer is made
# from its vocabulary and merges, and the dummy blank depends on `legacy`, which repositories state or not.
LAYOUTS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "legacy": True},
    "llama": {"model_type": "llama"},
    "llama, legacy": {"model_type": "llama", "legacy": True},
    "llama, no tokenizer.json": {"model_type": "llama", "legacy": True, "bare": True},
}


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    """Mistral 7B v0.1's SentencePiece model file, 32,000 pieces."""
    return Path(str(import_module("mistral_common").__file__)).parent / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def pieces(vocabulary: Path) -> Any:
    """SentencePiece itself, which knows nothing of transformers: encodes with the dummy blank, spells no special."""
    return import_module("sentencepiece").SentencePieceProcessor(model_file=str(vocabulary))


def backend(pieces: Any) -> Tokenizer:
    """SentencePiece's BPE for the tokenizers library, as `tokenizer.json` of mistralai/Mistral-7B-v0.1 writes it.

    The merges stand in the order of their pieces' scores. What transformers 5.23 derives from a bare `tokenizer.model`
    follows the ids instead, and so joins two blanks before it joins a blank with the word after it.
    """
    names = [pieces.id_to_piece(i) for i in range(len(pieces))]
    vocab = {name: i for i, name in enumerate(names)}
    ordinary = [i for i in vocab.values() if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))]
    merges = [
        (names[i][:cut], names[i][cut:])
        for i in sorted(ordinary, key=lambda i: -pieces.get_score(i))
        for cut in range(1, len(names[i]))
        if names[i][:cut] in vocab and names[i][cut:] in vocab
    ]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")])
    return made


@pytest.fixture(scope="module")
def tokenizers(vocabulary: Path, pieces: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tokenizer for each of LAYOUTS, loaded from a folder laid out as the repositories on the hub are."""
    done = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        shutil.copy(vocabulary, folder / "tokenizer.model")
        if not layout.get("bare"):
            backend(pieces).save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 10**9}
        settings |= {key: layout[key] for key in layout if key == "legacy"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_text(json.dumps({"model_type": layout["model_type"]}))
        done[name] = load_tokenizer(folder)
    return done


@pytest.fixture(scope="module")
def pairs(mirror: Path) -> list[Pair]:
    """200 dialogues of the mirror, spread evenly over its rows."""
    parts = ((HH, "harmless", 70), (HH, "helpful", 70), (PKU, "harmless", 60))
    picked: list[Pair] = []
    for dataset, rule, wanted in parts:
        every = load_split(dataset, Preference(rule), "test", str(mirror)).pairs
        picked += [every[i * len(every) // wanted] for i in range(wanted)]
    return picked


# Text that spells what ends a turn, what begins one, or what the vocabulary has no piece for; blanks in a row.
ODD = Pair(
    "odd",
    (Message("user", "say </s> or <s>"), Message("assistant", "</s>  [INST]"), Message("user", "<unk>\n\n  two\tè🐈")),
    "[/INST] well</s>",
    "\u200bUSER:  no <s>",
)


def both(pair: Pair, tokens: TokenizedPair) -> list[tuple[str, list[int]]]:
    """The two responses of a pair, each as text and as token ids."""
    return [(pair.chosen, tokens.chosen), (pair.rejected, tokens.rejected)]


def test_the_dialogues_are_200_single_turn_and_multi_turn_ones_with_blanks_in_a_row(pairs: list[Pair]) -> None:
    turns = [sum(message.role == "user" for message in pair.prompt) for pair in pairs]
    assert len(pairs) == 200
    assert sum(n == 1 for n in turns) >= 60
    assert sum(n > 1 for n in turns) >= 60
    assert any("  " in message.content for pair in pairs for message in pair.prompt)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tokenizers_encode_real_text_as_sentencepiece_itself_does(
    tokenizers: dict[str, Any], pieces: Any, pairs: list[Pair], layout: str
) -> None:
    tokenizer = tokenizers[layout]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (BOS, EOS, 32000)
    texts = [text for p in pairs for text in (*(message.content for message in p.prompt), p.chosen, p.rejected)]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == [pieces.encode(text) for text in texts]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mistral_ids_of_prompt_and_response_equal_mistral_commons_v1_encoding(
    tokenizers: dict[str, Any], vocabulary: Path, pairs: list[Pair], layout: str
) -> None:
    messages = import_module("mistral_common.protocol.instruct.messages")
    request = import_module("mistral_common.protocol.instruct.request").ChatCompletionRequest
    # `finetuning` is the mode of training samples: the last message must be the assistant's.
    mode = import_module("mistral_common.protocol.instruct.validator").ValidationMode.finetuning
    official = import_module("mistral_common.tokens.tokenizers.mistral").MistralTokenizer.from_file(
        str(vocabulary), mode
    )
    turn = {"user": messages.UserMessage, "assistant": messages.AssistantMessage}
    done, _ = tokenize([*pairs, ODD], tokenizers[layout], "mistral", WHOLE)
    for pair, tokens in zip([*pairs, ODD], done, strict=True):
        turns = [turn[message.role](content=message.content) for message in pair.prompt]
        for text, ids in both(pair, tokens):
            dialogue = request(messages=[*turns, messages.FinetuningAssistantMessage(content=text)])
            assert tokens.prompt + ids == official.encode_chat_completion(dialogue).tokens


def fastchat_prompt(pair: Pair, answer: str | None) -> str:
    """FastChat's text of a dialogue; without an answer, up to where the assistant's begins."""
    conversation = import_module("fastchat.conversation").get_conv_template("vicuna_v1.1")
    user, assistant = conversation.roles
    for message in pair.prompt:
        conversation.append_message(user if message.role == "user" else assistant, message.content)
    conversation.append_message(assistant, answer)
    return str(conversation.get_prompt())


def test_vicuna_text_of_prompt_and_response_equals_fastchats(tokenizers: dict[str, Any], pairs: list[Pair]) -> None:
    for pair in pairs:
        segments, gap = render("vicuna", pair.prompt, tokenizers["llama"])
        prompt = "</s>".join(segments)
        assert prompt == fastchat_prompt(pair, None)
        for answer in (pair.chosen, pair.rejected):
            assert f"{prompt}{gap}{answer}</s>" == fastchat_prompt(pair, answer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vicuna_ids_equal_sentencepieces_of_fastchats_text_cut_at_its_end_tokens(
    tokenizers: dict[str, Any], pieces: Any, pairs: list[Pair], layout: str
) -> None:
    """What LLaMA-1's own tokenizer makes of FastChat's text: bos; each `</s>` is the eos token; what stands between two
    of them is encoded by SentencePiece by itself, so with a dummy blank before its "USER:"."""
    done, _ = tokenize(pairs, tokenizers[layout], "vicuna", WHOLE)
    for pair, tokens in zip(pairs, done, strict=True):
        for answer, ids in both(pair, tokens):
            *turns, rest = fastchat_prompt(pair, answer).split("</s>")
            assert rest == ""
            assert tokens.prompt + ids == [BOS] + [token for turn in turns for token in [*pieces.encode(turn), EOS]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("template", ["mistral", "vicuna"])
def test_what_is_trained_on_is_the_response_and_the_end_token_and_nothing_else(
    tokenizers: dict[str, Any], pieces: Any, pairs: list[Pair], layout: str, template: str
) -> None:
    tokenizer = tokenizers[layout]
    done, _ = tokenize([*pairs, ODD], tokenizer, template, WHOLE)
    for pair, tokens in zip([*pairs, ODD], done, strict=True):
        segments, _ = render(template, pair.prompt, tokenizer)
        alone = [token for segment in segments for token in [EOS, *pieces.encode(segment)]]
        assert tokens.prompt == [BOS, *alone[1:]]  # no token of the prompt is another one for the response after it
        for text, ids in both(pair, tokens):
            assert ids[-1] == EOS
            assert EOS not in ids[:-1]
            assert pieces.decode(ids[:-1]) == text
            assert tokenizer.decode(ids[:-1]) == text


@pytest.mark.parametrize("template", ["mistral", "vicuna"])
def test_truncation_keeps_the_prompts_end_and_is_counted(
    tokenizers: dict[str, Any], pairs: list[Pair], template: str
) -> None:
    tokenizer, limit = tokenizers["llama"], 200
    whole, uncut = tokenize(pairs, tokenizer, template, WHOLE)
    assert uncut == {"truncated prompts": 0, "truncated responses": 0}
    cut, counted = tokenize(pairs, tokenizer, template, limit)
    prompts = responses = 0
    for before, after in zip(whole, cut, strict=True):
        assert len(after.prompt) + max(len(after.chosen), len(after.rejected)) <= limit
        assert after.prompt[0] == BOS
        assert after.prompt[1:] == before.prompt[len(before.prompt) - len(after.prompt) + 1 :]
        assert before.chosen[: len(after.chosen)] == after.chosen
        assert before.rejected[: len(after.rejected)] == after.rejected
        prompts += len(after.prompt) < len(before.prompt)
        responses += (len(after.chosen) < len(before.chosen)) + (len(after.rejected) < len(before.rejected))
    assert counted == {"truncated prompts": prompts, "truncated responses": responses}
    assert min(prompts, responses) > 0
