"""Judges that this machine runs: a chat model, a sequence classifier, the scorer of a wheel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_align.config.judges import Classifier, LocalLM
from peft_align.data.pairs import Message
from peft_align.errors import Fault, InputError
from peft_align.evaluation.judges import Keep, TextScore
from peft_align.store.hub import find_repository

SCORED_AT_A_TIME = 1024  # texts given to the wheel's scorer at a time


@dataclass
class LanguageModel:
    """A chat model, loaded once. Raises InputError if it cannot be had."""

    judge: LocalLM
    mirror: str | None

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import BitsAndBytesConfig

        from peft_align.models.loading import DTYPES, keep_quantized_weights, load_causal_lm

        folder = find_folder(self.judge.hub_id, self.judge.revision, self.mirror)
        quantized = self.judge.precision == "nf4"
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if quantized else None
        model, tokenizer = load_causal_lm(folder, DTYPES["bf16" if quantized else self.judge.precision], how)
        if tokenizer.chat_template is None:
            what = "has no chat template: it cannot be asked"
            raise InputError([Fault(str(folder), what, "name a chat model in judge.hub_id")])
        keep_quantized_weights(model)
        return model, tokenizer

    def ask(self, questions: list[list[Message]], keep: Keep) -> None:
        """Answer each question, greedily; `keep` is called with each answer, a batch at a time."""
        from peft_align.data.tokenization import prompt_ids
        from peft_align.evaluation.generation import Prompt, Settings, Text, generate

        model, tokenizer = self._loaded
        prompts = [Prompt(str(i), prompt_ids(q, tokenizer, "chat")) for i, q in enumerate(questions)]

        def batch(texts: list[Text]) -> None:
            for text in texts:
                i = int(text.id)
                keep(i, text.text, {"input_tokens": len(prompts[i].ids), "output_tokens": text.tokens})

        generate(
            model, tokenizer, prompts, Settings(self.judge.max_tokens), batch_size=self.judge.batch_size, keep=batch
        )


def classifier(judge: Classifier, mirror: str | None) -> Callable[[Sequence[str]], list[TextScore]]:
    """A sequence classifier of transformers as a scorer.

    With one logit (nicholasKluge/ToxicityModel) the logit is the score, and toxicity is its sigmoid, turned round if a
    higher score is better. With several, `label` names the one whose probability is both: of a softmax, or of its own
    sigmoid where labels do not exclude each other.

    Raises:
        InputError: the model cannot be had, or has no such label.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from peft_align.models.loading import DTYPES, cannot_be_loaded, check_folder, check_weights, device

    folder = find_folder(judge.hub_id, judge.revision, mirror)
    check_folder(folder)
    with cannot_be_loaded(folder):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=DTYPES[judge.precision],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_weights refuses them, by name
        )
        check_weights(folder, found)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model.to(device()).eval()
    column = _column(judge, model.config, folder)
    several = model.config.problem_type == "multi_label_classification"  # each label by itself

    @torch.inference_mode()
    def score(texts: Sequence[str]) -> list[TextScore]:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found: list[TextScore | None] = [None] * len(texts)
        for start in range(0, len(order), judge.batch_size):
            batch = order[start : start + judge.batch_size]
            encoded = tokenizer(
                [texts[i] for i in batch],
                truncation=True,
                max_length=judge.max_length,
                padding=True,
                return_token_type_ids=False,
                return_tensors="pt",
            ).to(model.device)
            logits = model(**encoded).logits.float()
            for i, row in zip(batch, logits, strict=True):
                if column is None:
                    logit = float(row[0])
                    toxic = -logit if judge.higher_is_better else logit
                    found[i] = TextScore(logit, 1 / (1 + math.exp(-max(-700.0, min(700.0, toxic)))))
                else:
                    probability = float((torch.sigmoid(row) if several else torch.softmax(row, dim=-1))[column])
                    found[i] = TextScore(probability, 1 - probability if judge.higher_is_better else probability)
        return [each for each in found if each is not None]

    return score


def _column(judge: Classifier, config: Any, folder: Path) -> int | None:
    """Which logit is the label's; None for the only one."""
    labels = {str(label): int(i) for i, label in config.id2label.items()}
    if judge.label is None and len(labels) > 1:
        what = f"has {len(labels)} labels ({', '.join(list(labels)[:8])}), and judge.label names none"
        raise InputError([Fault(str(folder), what, "name the label whose probability is the score")])
    if judge.label is not None and judge.label not in labels:
        raise InputError(
            [Fault(f"judge.label={judge.label}", "is no label of the model", f"allowed: {', '.join(labels)}")]
        )
    if judge.label is not None and len(labels) == 1:
        what = "has one logit, which is the score: no share of a softmax"
        raise InputError([Fault(f"judge.label={judge.label}", f"{folder} {what}", "set judge.label=null")])
    return None if judge.label is None else labels[judge.label]


def profanity() -> Callable[[Sequence[str]], list[TextScore]]:
    """The scorer of the wheel alt-profanity-check: a probability, higher is worse. The wheel loads its own pickle."""
    try:
        from profanity_check import predict_prob
    except ImportError:
        hint = "pip install 'peft-align[profanity]'"
        raise InputError([Fault("judge=profanity", "the package alt-profanity-check is not installed", hint)]) from None

    def score(texts: Sequence[str]) -> list[TextScore]:
        found: list[TextScore] = []
        for start in range(0, len(texts), SCORED_AT_A_TIME):
            found += [
                TextScore(float(p), float(p)) for p in predict_prob(list(texts[start : start + SCORED_AT_A_TIME]))
            ]
        return found

    return score


def find_folder(hub_id: str, revision: str | None, mirror: str | None) -> Path:
    """The folder of a judge's model: the user's own, the mirror's, or the hub's. Raises InputError."""
    return find_repository(hub_id, revision, "model", mirror, where=f"judge.hub_id={hub_id}")[0]
