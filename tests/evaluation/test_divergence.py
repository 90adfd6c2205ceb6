"""The divergence from the base: nothing for the base itself, else what plain transformers computes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from sweeping import expand
from transformers import AutoModelForCausalLM

from peft_align.config.benchmarks import Divergence
from peft_align.data.tokenization import TokenizedPair
from peft_align.evaluation.divergence import Drawn, draw, score
from peft_align.evaluation.preference import Heldout, PreferenceBenchmark
from peft_align.evaluation.scores import Metric, Scores
from peft_align.evaluation.suite import Suite
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.models.adapters import loaded_adapter, new_adapter, save_adapter, take_off
from peft_align.models.loading import Base, load_base
from peft_align.store.journal import Journal
from peft_align.store.records import read_json
from peft_align.store.runs import RunDir
from peft_align.training.run import train

WORDS = (
    "model=tiny", "dataset=everyday", "method=dpo", "peft=lora", "peft.compute_dtype=fp32", "train.max_steps=2",
    "train.batch_size=2", "train.learning_rate=1e-2", "train.max_length=300", "evaluation.benchmarks=[divergence]",
    "evaluation.heldout=6", "benchmark.divergence.max_new_tokens=12",
)  # fmt: skip


@pytest.fixture(scope="module")
def run() -> Run:
    return expand(*WORDS).runs[0]


@pytest.fixture(scope="module")
def base(run: Run) -> Base:
    return load_base(run.config)


@pytest.fixture(scope="module")
def heldout(run: Run, base: Base) -> Heldout:
    """The run's held-out pairs; of their prompts the first bytes, of different lengths."""
    found = PreferenceBenchmark().heldout(run, run.scorings[0], base)
    cut = [dataclasses.replace(pair, prompt=pair.prompt[: 12 + 3 * i]) for i, pair in enumerate(found.pairs)]
    return dataclasses.replace(found, pairs=cut)


@pytest.fixture(scope="module")
def adapter(run: Run, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that moves the base somewhere."""
    folder = tmp_path_factory.mktemp("perturbed") / "adapter"
    model = new_adapter(base, run.config.peft)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.12, generator=generator)
    save_adapter(model, folder, "base")
    take_off(base, model)
    return folder


def benchmark_of(run: Run, **other: Any) -> Divergence:
    ((_, found),) = run.scorings[0].benchmarks
    assert isinstance(found, Divergence)
    return dataclasses.replace(found, **other)


def drawn_from(
    run: Run,
    base: Base,
    heldout: Heldout,
    model: Any,
    journal: Path,
    size: int = 4,
    limit: int | None = None,
    **other: Any,
) -> Drawn:
    kept = Journal(journal, {})
    return draw(benchmark_of(run, **other), heldout, limit, base, model, size, kept, lambda done, of: None)


def measured(run: Run, base: Base, heldout: Heldout, adapter: Path, folder: Path, **other: Any) -> tuple[Drawn, Scores]:
    with loaded_adapter(base, adapter) as model:
        drawn = drawn_from(run, base, heldout, model, folder / "journal", **other)
    return drawn, score(drawn, base, 4, aligned=True)


def named(found: list[Metric], name: str) -> Metric:
    return next(metric for metric in found if metric.name == name)


@torch.inference_mode()
def plain_log_probability(model: Any, prompt: list[int], response: list[int]) -> float:
    """One sequence by itself, without padding, in double precision from the logits on."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    chances = torch.log_softmax(logits, dim=-1)
    return sum(float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(response))


def plain_models(base: Base, adapter: Path) -> tuple[Any, Any]:
    """The adapted model and the base by PEFT and transformers alone, each loaded for itself."""
    own, bare = (AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval() for _ in range(2))
    return PeftModel.from_pretrained(own, adapter).eval(), bare


def test_the_base_is_no_distance_from_itself(run: Run, base: Base, heldout: Heldout, tmp_path: Path) -> None:
    drawn = drawn_from(run, base, heldout, base.model, tmp_path / "journal")
    found = score(drawn, base, 2, aligned=True)
    for name in ("kl", "kl_per_token"):
        assert named(found.metrics, name).value == pytest.approx(0, abs=1e-5)
    for sample in found.samples:
        assert sample["logp"] == pytest.approx(sample["base_logp"], abs=1e-5)
        assert sample["logp"] < -1


def test_a_fresh_adapter_is_no_distance_from_the_base(run: Run, base: Base, heldout: Heldout, tmp_path: Path) -> None:
    model = new_adapter(base, run.config.peft)
    save_adapter(model, tmp_path / "adapter", "base")
    take_off(base, model)
    _, found = measured(run, base, heldout, tmp_path / "adapter", tmp_path)
    assert named(found.metrics, "kl").value == pytest.approx(0, abs=1e-5)


def test_the_divergence_is_what_plain_transformers_computes_of_the_same_tokens(
    run: Run, base: Base, heldout: Heldout, adapter: Path, tmp_path: Path
) -> None:
    drawn, found = measured(run, base, heldout, adapter, tmp_path)
    assert [prompt for prompt, _ in drawn.pairs] == [pair.prompt for pair in heldout.pairs]
    adapted, bare = plain_models(base, adapter)
    ratios = []
    for sample, (prompt, response), pair in zip(found.samples, drawn.pairs, heldout.pairs, strict=True):
        own, other = (plain_log_probability(model, prompt, response) for model in (adapted, bare))
        assert (sample["logp"], sample["base_logp"]) == (pytest.approx(own, abs=1e-4), pytest.approx(other, abs=1e-4))
        assert (sample["id"], sample["tokens"]) == (pair.id, len(response))
        assert sample["output"] == base.tokenizer.decode(response, skip_special_tokens=True)
        ratios.append(own - other)
    kl = named(found.metrics, "kl")
    assert (kl.value, kl.n, kl.higher_is_better) == (pytest.approx(statistics.mean(ratios), abs=1e-4), 6, None)
    assert kl.stderr == pytest.approx(statistics.stdev(ratios) / math.sqrt(6), abs=1e-4)
    per_token = [ratio / len(response) for ratio, (_, response) in zip(ratios, drawn.pairs, strict=True)]
    assert named(found.metrics, "kl_per_token").value == pytest.approx(statistics.mean(per_token), abs=1e-4)
    assert named(found.metrics, "response_tokens").value == statistics.mean(len(r) for _, r in drawn.pairs)
    assert abs(kl.value) > 0.05  # the adapter does something
    assert found.inputs == {"data": heldout.source}


def test_one_token_diverges_as_far_as_the_exact_sum_over_the_vocabulary(
    run: Run, base: Base, heldout: Heldout, adapter: Path, tmp_path: Path
) -> None:
    prompts = [pair.prompt for pair in heldout.pairs]
    many = [TokenizedPair(f"{k}/{i}", ids, [], []) for k in range(250) for i, ids in enumerate(prompts)]
    repeated = Heldout(many, heldout.source, {})
    other = {"max_new_tokens": 1, "prompts": len(many), "size": 500}
    _, found = measured(run, base, repeated, adapter, tmp_path, **other)
    adapted, bare = plain_models(base, adapter)
    exact = []
    for ids in prompts:
        with torch.inference_mode():
            ours, theirs = (
                torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1)
                for model in (adapted, bare)
            )
        exact.append(float((ours.exp() * (ours - theirs)).sum()))
    kl = named(found.metrics, "kl")
    assert kl.n == 1500
    assert kl.stderr is not None
    assert abs(kl.value - statistics.mean(exact)) < 4 * kl.stderr
    assert statistics.mean(exact) > 10 * kl.stderr  # the estimate is not near nothing by its error
    assert named(found.metrics, "kl_per_token").value == pytest.approx(kl.value)


def test_the_base_alone_has_lengths_and_no_divergence(run: Run, base: Base, heldout: Heldout, tmp_path: Path) -> None:
    drawn = drawn_from(run, base, heldout, base.model, tmp_path / "journal")
    found = score(drawn, base, 4, aligned=False)
    assert {metric.name for metric in found.metrics} == {"response_tokens", "response_words", "cut_off_rate"}
    assert all("base_logp" not in sample for sample in found.samples)
    lengths = [len(response) for _, response in drawn.pairs]
    assert named(found.metrics, "response_tokens").value == statistics.mean(lengths)
    cut = [response[-1] != base.tokenizer.eos_token_id for _, response in drawn.pairs]
    assert named(found.metrics, "cut_off_rate").value == statistics.mean(cut)
    assert all(length == 12 or not is_cut for length, is_cut in zip(lengths, cut, strict=True))


def test_the_end_token_is_a_part_of_the_response_and_is_scored(
    run: Run, base: Base, heldout: Heldout, tmp_path: Path
) -> None:
    many = Heldout([TokenizedPair(f"s{i}", heldout.pairs[0].prompt, [], []) for i in range(150)], {}, {})
    drawn = drawn_from(run, base, many, base.model, tmp_path / "journal", size=150, prompts=150)
    ended = [(pair, own) for pair, own in zip(drawn.pairs, drawn.own, strict=True) if len(pair[1]) < 12]
    assert len(ended) > 3
    for (prompt, response), own in ended:
        assert response[-1] == base.tokenizer.eos_token_id
        assert own == pytest.approx(plain_log_probability(base.model, prompt, response), abs=1e-4)


def test_what_an_interrupted_attempt_drew_is_not_drawn_again(
    run: Run, base: Base, heldout: Heldout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    first = drawn_from(run, base, heldout, base.model, path, size=2)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    path.write_bytes(b"".join(lines[:4]) + lines[4][:5])  # the first batch, and half of the second
    calls: list[int] = []
    generate = base.model.generate

    def counting(**named: Any) -> Any:
        calls.append(len(named["input_ids"]))
        return generate(**named)

    monkeypatch.setattr(base.model, "generate", counting)
    assert drawn_from(run, base, heldout, base.model, path, size=2) == first
    assert calls == [2, 2]
    assert path.read_bytes() == b"".join(lines)


def test_prompts_and_limit_say_how_many_of_the_held_out_pairs_are_asked(
    run: Run, base: Base, heldout: Heldout, tmp_path: Path
) -> None:
    every = drawn_from(run, base, heldout, base.model, tmp_path / "a")
    few = drawn_from(run, base, heldout, base.model, tmp_path / "b", prompts=3)
    limited = drawn_from(run, base, heldout, base.model, tmp_path / "c", limit=2)
    assert (every.names, few.names, limited.names) == (
        [pair.id for pair in heldout.pairs], every.names[:3], every.names[:2],
    )  # fmt: skip
    assert few.texts == every.texts[:3]  # each is seeded by itself
    other = drawn_from(run, base, heldout, base.model, tmp_path / "d", seed=1)
    assert all(a != b for a, b in zip(other.pairs, every.pairs, strict=True))


def evaluated(run: Run, root: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record and the samples of the run's one evaluation, done if it is missing."""
    directory, planner = RunDir(root, run.id), Planner(root, None)
    base = load_base(run.config)
    if planner.item(run).to_make:
        train(run, directory, base, lambda metrics, step: None)
    Suite().evaluate(run, directory, base, [request for request, _ in planner.item(run).missing])
    item = planner.item(run)
    assert item.done
    folder = directory.evaluation(item.requests[0].name)
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "samples.jsonl.gz"]  # no journal is left
    with gzip.open(folder / "samples.jsonl.gz", "rt", encoding="utf-8") as file:
        return read_json(folder / "record.json") or {}, [json.loads(line) for line in file]


def test_a_trained_run_has_a_divergence_and_its_baseline_has_none(tmp_path: Path) -> None:
    run, baseline = expand(*WORDS).runs
    record, samples = evaluated(run, tmp_path)
    base_record, base_samples = evaluated(baseline, tmp_path)
    values = {metric["name"]: metric["value"] for metric in record["metrics"]}
    ratios = [sample["logp"] - sample["base_logp"] for sample in samples]
    assert values["kl"] == pytest.approx(statistics.mean(ratios))
    assert max(map(abs, ratios)) > 1e-3
    assert {metric["name"] for metric in base_record["metrics"]} == {
        "response_tokens",
        "response_words",
        "cut_off_rate",
    }
    assert [s["id"] for s in samples] == [s["id"] for s in base_samples]
    assert (record["dataset"], record["preference"], record["step"]) == ("everyday", "harmless", 2)


def test_another_number_of_held_out_prompts_is_another_evaluation(tmp_path: Path) -> None:
    """Of 6 held-out pairs and 128 prompts wanted, 6 are asked; of 7, 7."""
    run = expand(*WORDS).runs[1]
    record, _ = evaluated(run, tmp_path)
    assert record["metrics"][0]["n"] == 6
    more = expand(*(word.replace("heldout=6", "heldout=7") for word in WORDS)).runs[1]
    assert more.id == run.id
    assert [request.benchmark for request, _ in Planner(tmp_path, None).item(more).missing] == ["divergence"]
