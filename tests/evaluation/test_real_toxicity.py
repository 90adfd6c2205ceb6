"""RealToxicityPrompts: the most severe of the real prompts, the scores of a judge, and the judges that score."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeping import shipped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

from peft_align.config.benchmarks import RealToxicity
from peft_align.config.judges import JUDGES, Classifier, Judge
from peft_align.errors import InputError
from peft_align.evaluation.judges import TextScore, open_scorer
from peft_align.evaluation.real_toxicity import data, judge, scores
from peft_align.evaluation.scores import Metric
from peft_align.evaluation.texts import Sample
from peft_align.grid.benchmarks import find_benchmark, of_kind

Row = dict[str, Any]


def benchmark_of(**tuned: Any) -> RealToxicity:
    faults: list[Any] = []
    found = find_benchmark(shipped(), "real_toxicity", None, tuned, faults)
    assert isinstance(found, RealToxicity), faults
    return found


def judge_of(option: str, **tuned: Any) -> Judge:
    faults: list[Any] = []
    found: Judge = of_kind(JUDGES, f"judge/{option}.yaml", shipped().load("judge", option), tuned, faults)
    assert not faults
    return found


@pytest.fixture(scope="module")
def rows(mirror: Path) -> list[Row]:
    with gzip.open(mirror / "allenai/real-toxicity-prompts/train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(mirror: Path, rows: Sequence[Row]) -> str:
    """The dataset as a mirror of these rows has it."""
    path = mirror / "allenai/real-toxicity-prompts/train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(mirror)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets makes of files that a test wrote goes with them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def sample(question: str, output: str, prompt: str = "Once") -> Sample:
    return {"id": output, "question": question, "prompt": prompt, "output": output, "tokens": 3, "ended": "length"}


def told(values: dict[str, float], heard: list[str] | None = None) -> Callable[[Sequence[str]], list[TextScore]]:
    """A scorer that says of each text what it was told: toxicity, and 10 times its complement as the score."""

    def score(texts: Sequence[str]) -> list[TextScore]:
        if heard is not None:
            heard.extend(texts)
        return [TextScore(10 * (1 - values[text]), values[text]) for text in texts]

    return score


def named(found: Sequence[Metric], name: str) -> Metric:
    return next(metric for metric in found if metric.name == name)


@pytest.mark.parametrize("key", ["severe_toxicity", "threat"])
def test_the_real_prompts_with_the_highest_score_come_in_descending_order(
    mirror: Path, rows: list[Row], key: str
) -> None:
    found = data(benchmark_of(sort_by=key), str(mirror))
    severity = [question.more[key] for question in found.questions]
    assert len(found.questions) == 1000
    assert severity == sorted(severity, reverse=True)
    told = [row for row in rows if row["prompt"][key] is not None]
    assert severity == sorted((row["prompt"][key] for row in told), reverse=True)[:1000]
    for question in found.questions:
        row = rows[int(question.id)]
        assert (question.text, question.more) == (row["prompt"]["text"], {key: row["prompt"][key]})
    assert len({question.id for question in found.questions}) == 1000
    assert list(found.inputs) == ["allenai/real-toxicity-prompts"]


@pytest.mark.usefixtures("no_cache")
def test_prompts_without_the_score_are_passed_over(tmp_path: Path, rows: list[Row]) -> None:
    """As some of the full dataset; the real sample has a score of each prompt, so every third loses it here."""
    some = [row | {"prompt": row["prompt"] | ({"threat": None} if i % 3 else {})} for i, row in enumerate(rows[:60])]
    found = data(benchmark_of(sort_by="threat"), write_rows(tmp_path, some)).questions
    assert {question.id for question in found} == {str(i) for i in range(0, 60, 3)}
    assert [q.more["threat"] for q in found] == sorted((row["prompt"]["threat"] for row in rows[:60:3]), reverse=True)
    assert len(data(benchmark_of(), str(tmp_path)).questions) == 60  # of severe toxicity none is absent


def test_fewer_prompts_are_the_most_severe_of_them(mirror: Path) -> None:
    few, many = (data(benchmark_of(prompts=n), str(mirror)).questions for n in (25, 1000))
    assert few == many[:25]
    assert few[0].more["severe_toxicity"] > 0.9
    other = data(benchmark_of(prompts=25, sort_by="sexually_explicit"), str(mirror)).questions
    assert {q.id for q in other} != {q.id for q in few}


@pytest.mark.usefixtures("no_cache")
def test_data_in_which_no_prompt_has_the_score_is_a_fault(tmp_path: Path, rows: list[Row]) -> None:
    mirror = write_rows(tmp_path, [{"prompt": {"text": row["prompt"]["text"], "toxicity": 0.5}} for row in rows[:3]])
    assert [q.id for q in data(benchmark_of(sort_by="toxicity"), mirror).questions] == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"sort_by: no prompt has a score severe_toxicity"):
        data(benchmark_of(), mirror)


def test_without_a_judge_there_are_lengths_and_all_samples() -> None:
    samples = [sample("0", "a b c"), sample("0", "")]
    found = scores(benchmark_of(), samples, "run")
    assert found.samples == samples
    assert {metric.name for metric in found.metrics} == {"response_words", "response_tokens", "cut_off_rate"}


def test_toxicity_of_several_continuations_is_that_of_gehman_et_al() -> None:
    toxic = {"a1": 0.1, "a2": 0.9, "b1": 0.2, "b2": 0.3, "c1": 0.5, "c2": 0.0, "d1": 0.4, "d2": 0.49}
    samples = [sample(name[0], name) for name in toxic]
    found = judge(benchmark_of(), samples, told(toxic), higher_is_better=True)
    maxima = [0.9, 0.3, 0.5, 0.49]
    maximum = named(found.metrics, "expected_maximum_toxicity")
    assert (maximum.value, maximum.n) == (pytest.approx(statistics.mean(maxima)), 4)
    assert maximum.stderr == pytest.approx(statistics.stdev(maxima) / 2)
    share = named(found.metrics, "toxicity_probability")
    assert (share.value, share.n, share.bound) == (0.5, 4, None)  # 0.9, and 0.5 just so
    assert share.stderr == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))
    mean = named(found.metrics, "toxicity")
    assert (mean.value, mean.n) == (pytest.approx(statistics.mean(toxic.values())), 8)
    by_prompt = [0.5, 0.25, 0.25, 0.445]
    assert mean.stderr == pytest.approx(statistics.stdev(by_prompt) / 2)  # of prompts, not of continuations
    assert mean.stderr != pytest.approx(statistics.stdev(toxic.values()) / math.sqrt(8), rel=0.05)
    score = named(found.metrics, "score")
    assert (score.value, score.stderr) == (pytest.approx(10 - 10 * mean.value), pytest.approx(10 * mean.stderr))
    assert {m.name: m.higher_is_better for m in found.metrics} == {
        "score": True, "toxicity": False, "expected_maximum_toxicity": False, "toxicity_probability": False,
    }  # fmt: skip
    assert [(s["id"], s["toxicity"]) for s in found.samples] == list(toxic.items())


def test_the_order_of_continuations_does_not_matter() -> None:
    toxic = {"a1": 0.1, "b1": 0.2, "a2": 0.9, "b2": 0.7}
    samples = [sample(name[0], name) for name in toxic]
    first, second = (
        judge(benchmark_of(), some, told(toxic), higher_is_better=False).metrics for some in (samples, samples[::-1])
    )
    for metric, other in zip(first, second, strict=True):
        assert (metric.value, metric.stderr) == (pytest.approx(other.value), pytest.approx(other.stderr))
    assert named(first, "expected_maximum_toxicity").value == pytest.approx(0.8)
    assert named(first, "score").higher_is_better is False


@pytest.mark.parametrize(("threshold", "share"), [(0.0, 1.0), (0.3, 1.0), (0.31, 0.5), (0.91, 0.0)])
def test_the_threshold_decides_what_counts_as_toxic(threshold: float, share: float) -> None:
    toxic = {"a1": 0.1, "a2": 0.9, "b1": 0.2, "b2": 0.3}
    samples = [sample(name[0], name) for name in toxic]
    found = judge(benchmark_of(threshold=threshold), samples, told(toxic), higher_is_better=False)
    rate = named(found.metrics, "toxicity_probability")
    assert rate.value == share
    assert (rate.bound is None) == (share == 0.5)


def test_the_judge_reads_the_continuation_or_the_prompt_before_it() -> None:
    heard: list[str] = []
    samples = [sample("0", " upon a time"), sample("1", "", "Alone")]
    judge(benchmark_of(), samples, told({" upon a time": 0.5, "": 0.0}, heard), higher_is_better=False)
    assert heard == [" upon a time", ""]
    heard.clear()
    values = {"Once upon a time": 0.5, "Alone": 0.0}
    judge(benchmark_of(scored="prompt_and_continuation"), samples, told(values, heard), higher_is_better=False)
    assert heard == list(values)


def test_real_continuations_of_toxic_prompts_score_higher_with_the_local_scorer(rows: list[Row]) -> None:
    score = open_scorer(judge_of("profanity"), None)
    mean: dict[tuple[bool, str], Metric] = {}
    for scored, toxic in itertools.product(("continuation", "prompt_and_continuation"), (True, False)):
        chosen = [row for row in rows if row["challenging"] == toxic][:100]
        samples = [sample(str(i), row["continuation"]["text"], row["prompt"]["text"]) for i, row in enumerate(chosen)]
        found = judge(benchmark_of(scored=scored), samples, score, higher_is_better=False)
        mean[toxic, scored] = named(found.metrics, "toxicity")
        assert all(0 <= s["toxicity"] == s["score"] <= 1 for s in found.samples)
        assert mean[toxic, scored].n == 100
    assert mean[True, "continuation"].value > mean[False, "continuation"].value + 0.05
    assert mean[True, "prompt_and_continuation"].value > mean[False, "prompt_and_continuation"].value + 0.3


def test_the_local_scorer_agrees_with_the_scores_of_the_data(rows: list[Row]) -> None:
    score = open_scorer(judge_of("profanity"), None)
    most, least = (
        sorted(rows, key=lambda row: -(row["prompt"]["profanity"] or 0))[part]
        for part in (slice(100), slice(-100, None))
    )
    high, low = ([s.toxicity for s in score([row["prompt"]["text"] for row in some])] for some in (most, least))
    assert statistics.median(high) > 0.9
    assert statistics.median(low) < 0.1
    assert score([]) == []


def write_classifier(folder: Path, labels: dict[int, str], seed: int = 0) -> Path:
    """A small RoBERTa of random weights with a tokenizer of bytes, as a repository has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=514, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
        initializer_range=0.3, num_labels=len(labels), id2label=labels,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        RobertaForSequenceClassification(config).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def one_logit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("judges") / "one", {0: "LABEL_0"})


@pytest.fixture(scope="module")
def two_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("judges") / "two", {0: "fine", 1: "toxic"})


def reward(folder: Path, **tuned: Any) -> Classifier:
    """The study's judge, with the small model in its place."""
    found = judge_of("toxicity_model", hub_id=str(folder), **tuned)
    assert isinstance(found, Classifier)
    return found


@functools.cache
def loaded(folder: Path) -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification.from_pretrained(folder).eval()


@torch.inference_mode()
def by_hand(folder: Path, text: str, longest: int = 512) -> torch.Tensor:
    """The logits of one text: its bytes between <s> and </s>, without a tokenizer's help."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    ids = [4 + alphabet[character] for piece, _ in pieces for character in piece]
    return loaded(folder)(input_ids=torch.tensor([[0, *ids[: longest - 2], 2]])).logits[0]


@pytest.fixture(scope="module")
def texts(rows: list[Row]) -> list[str]:
    """Real continuations of different lengths, an empty text, and one that is too long."""
    return [
        *(row["continuation"]["text"] for row in rows[:9]),
        "",
        " ".join(row["prompt"]["text"] for row in rows[:40]),
    ]


def test_the_score_of_a_model_with_one_logit_is_the_logit(one_logit: Path, texts: list[str]) -> None:
    alone = open_scorer(reward(one_logit, batch_size=1), None)(texts)
    together = open_scorer(reward(one_logit, batch_size=8), None)(texts)
    expected = [float(by_hand(one_logit, text)[0]) for text in texts]
    assert max(len(text.encode()) for text in texts) > 512
    assert statistics.stdev(expected) > 0.05
    for one, of_eight, logit in zip(alone, together, expected, strict=True):
        assert one.score == pytest.approx(logit, abs=1e-5)
        assert of_eight.score == pytest.approx(logit, abs=1e-5)
        assert one.toxicity == pytest.approx(1 / (1 + math.exp(logit)), abs=1e-5)  # higher is better: sigmoid(-logit)
    worse = open_scorer(reward(one_logit, higher_is_better=False), None)(texts)
    for one, other in zip(alone, worse, strict=True):
        assert other.score == pytest.approx(one.score, abs=1e-5)
        assert other.toxicity == pytest.approx(1 - one.toxicity, abs=1e-5)


def test_a_text_that_is_too_long_loses_its_end(one_logit: Path, texts: list[str]) -> None:
    text = texts[3]
    assert len(text) > 20
    (short,) = open_scorer(reward(one_logit, max_length=12), None)([text])
    assert short.score == pytest.approx(float(by_hand(one_logit, text, 12)[0]), abs=1e-5)
    (other,) = open_scorer(reward(one_logit, max_length=12), None)([text[:10] + "other words"])
    assert other.score == pytest.approx(short.score, abs=1e-5)


def test_continuations_are_judged_by_a_classifier(one_logit: Path, texts: list[str]) -> None:
    samples = [sample(str(i // 2), text) for i, text in enumerate(texts)]
    chosen = reward(one_logit)
    assert chosen.higher_is_better
    found = judge(benchmark_of(), samples, open_scorer(chosen, None), higher_is_better=chosen.higher_is_better)
    expected = [float(by_hand(one_logit, text)[0]) for text in texts]
    score = named(found.metrics, "score")
    assert (score.value, score.higher_is_better) == (pytest.approx(statistics.mean(expected), abs=1e-5), True)
    assert [s["score"] for s in found.samples] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("label", "column"), [("fine", 0), ("toxic", 1)])
def test_the_score_of_a_label_is_its_probability(two_labels: Path, texts: list[str], label: str, column: int) -> None:
    found = open_scorer(reward(two_labels, label=label, higher_is_better=label == "fine"), None)(texts)
    for text, one in zip(texts, found, strict=True):
        logits = by_hand(two_labels, text)
        assert one.score == pytest.approx(float(torch.softmax(logits, -1)[column]), abs=1e-5)
        assert one.toxicity == pytest.approx(float(torch.softmax(logits, -1)[1]), abs=1e-5)
    assert statistics.stdev(one.score for one in found) > 0.01


@pytest.mark.parametrize(
    ("label", "what"), [(None, r"has 2 labels \(fine, toxic\)"), ("rude", r"label=rude.*allowed: fine, toxic")]
)
def test_a_label_that_is_missing_or_unknown_is_a_fault_that_names_the_models(
    two_labels: Path, label: str | None, what: str
) -> None:
    with pytest.raises(InputError, match=what):
        open_scorer(reward(two_labels, label=label), None)


def test_a_label_of_a_model_with_one_logit_is_no_certainty(one_logit: Path, texts: list[str]) -> None:
    """Over a single logit softmax is 1, whatever the text: refused, or the logit's own score, but not that."""
    try:
        found = open_scorer(reward(one_logit, label="LABEL_0"), None)(texts)
    except InputError:
        return
    assert len({round(one.score, 6) for one in found}) > 1


def test_a_judge_is_found_in_the_mirror_by_its_name(one_logit: Path, tmp_path: Path, texts: list[str]) -> None:
    place = tmp_path / "nobody/toxicity"
    place.parent.mkdir()
    place.symlink_to(one_logit)
    found = open_scorer(reward(Path("nobody/toxicity")), str(tmp_path))(texts[:2])
    assert found == open_scorer(reward(one_logit), None)(texts[:2])
    with pytest.raises(InputError, match=r"nobody/toxicity.*set hub\.mirror=DIR"):
        open_scorer(reward(Path("nobody/toxicity")), str(tmp_path / "elsewhere"))


def test_a_folder_without_a_model_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_scorer(reward(tmp_path), None)
