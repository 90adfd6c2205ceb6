"""What is not finite, or has nothing to learn from, ends a run with the step, the value and the rows; others go on."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, run_of, runs_of, trained

from peft_align.data.order import sample_order
from peft_align.data.tokenization import TokenizedPair, check_scored
from peft_align.errors import InputError
from peft_align.grid.runs import Run
from peft_align.launch.job import Worker
from peft_align.models.loading import Base, load_base
from peft_align.store.records import read_json
from peft_align.store.references import sample_digest
from peft_align.store.runs import RunDir
from peft_align.training import numerics, packed, recorder
from peft_align.training.numerics import TrainingFailed
from peft_align.training.run import train, training_rows

SMALL = (
    "model=tiny", "dataset=everyday", "peft=lora", *FP32, "train.max_steps=3", "train.batch_size=4",
    "train.max_length=200",
)  # fmt: skip
ENGINES = pytest.mark.parametrize("engine", ["packed", "trl"])


def failed(run: Run, root: Path, base: Base) -> TrainingFailed:
    """What training the run ends with."""
    with pytest.raises(TrainingFailed) as caught:
        trained(run, root, base)
    return caught.value


def lines(root: Path, run: Run) -> list[dict[str, Any]]:
    """The metrics of each step, of an attempt that failed or of the whole run."""
    directory = RunDir(root, run.id)
    path = directory.attempt / "metrics.jsonl"
    text = (path if path.is_file() else directory.path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def batches(run: Run, base: Base) -> list[list[TokenizedPair]]:
    """The samples of each step."""
    rows, _ = training_rows(run.config, base)
    size = run.config.train.batch_size
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def plant(base: Base, run: Run) -> tuple[int, TokenizedPair, Any]:
    """Have the embedding of a token be no number that one sample alone is trained on.

    Returns the step of the sample, the sample, and a handle whose `remove` has it as before.
    """
    steps, both = batches(run, base), run.config.method.kind == "dpo"
    tokens = [set(row.prompt + row.chosen + (row.rejected if both else [])) for step in steps for row in step]
    counts = Counter(token for some in tokens for token in some)
    at, token = next((i, t) for i, some in enumerate(tokens) for t in sorted(some) if counts[t] == 1 and i >= 4)
    row = steps[at // 4][at % 4]
    embed = base.model.get_input_embeddings()

    def broken(module: Any, inputs: Any, found: torch.Tensor) -> torch.Tensor:
        return torch.where((inputs[0] == token)[..., None], torch.nan, found)

    return at // 4 + 1, row, embed.register_forward_hook(broken)


@pytest.mark.parametrize("method", ["sft", "dpo"])
@ENGINES
def test_a_learning_rate_that_explodes_fails_the_run_with_step_value_and_rows(
    engine: str, method: str, tmp_path: Path
) -> None:
    words = ("train.learning_rate=1e30", "train.max_grad_norm=1e30", f"train.engine={engine}", f"method={method}")
    run = run_of(*SMALL, *words)
    base = load_base(run.config)
    error = failed(run, tmp_path, base)
    made = lines(tmp_path, run)
    step, rows = len(made), batches(run, base)[len(made) - 1]
    assert error.details["step"] == step
    assert 2 <= step <= 3
    assert error.details["rows_of_step"] == made[-1]["rows"] == [row.id for row in rows]
    assert set(error.details["rows"]) <= set(made[-1]["rows"])
    named = [row for row in rows if row.id in error.details["rows"]]
    assert error.details["samples"] == [sample_digest(row.prompt, row.chosen, row.rejected) for row in named]
    assert not math.isfinite(float(error.details["value"]))
    assert f"at step {step}; " in str(error)
    assert error.details["rows"][0] in str(error)
    assert RunDir(tmp_path, run.id).train_record() is None
    assert not any(p.requires_grad for p in base.model.parameters())


@ENGINES
def test_a_sample_whose_embedding_is_no_number_is_named(engine: str, tmp_path: Path) -> None:
    """The engine packed knows whose loss it is; TRL's knows the step."""
    run = run_of(*SMALL, "method=sft", f"train.engine={engine}")
    base = load_base(run.config)
    step, row, _ = plant(base, run)
    error = failed(run, tmp_path, base)
    assert (error.details["what"], error.details["step"], error.details["value"]) == ("loss", step, "nan")
    rows = batches(run, base)[step - 1]
    if engine == "packed":
        assert error.details["rows"] == [row.id]
        assert str(error) == f"the loss is nan at step {step}; that of row {row.id} is not finite"
        assert [loss == "nan" for loss in error.details["row_losses"]] == [each.id == row.id for each in rows]
    else:
        assert error.details["rows"] == [each.id for each in rows]
        assert error.details["row_losses"] == []
    assert json.loads(json.dumps(error.details, allow_nan=False)) == error.details


def test_a_reference_that_is_no_number_is_told_before_the_first_step_and_kept_by_nobody(tmp_path: Path) -> None:
    run = run_of(*SMALL, "method=dpo")
    base = load_base(run.config)
    _, row, planted = plant(base, run)
    error = failed(run, tmp_path, base)
    assert str(error) == f"the reference's log-probability is nan of row {row.id}"
    assert (error.details["what"], error.details["rows"]) == ("reference", [row.id])
    planted.remove()
    assert len(trained(run, tmp_path, base)["loss"]) == 3


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, run_id: str, step: int) -> None:
    """Have a run's gradient be infinite from a step on, whatever its loss."""
    begin, log = recorder.Recorder.on_train_begin, recorder.Recorder.on_log
    made = {}

    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.run.id == run_id:
            made[run_id] = 0
            self.trained[0].register_hook(lambda g: g * math.inf if made[run_id] >= step - 1 else g)

    def on_log(self: Any, *args: Any, **kwargs: Any) -> None:
        log(self, *args, **kwargs)
        if self.run.id == run_id:
            made[run_id] += 1

    monkeypatch.setattr(recorder.Recorder, "on_train_begin", on_train_begin)
    monkeypatch.setattr(recorder.Recorder, "on_log", on_log)


@ENGINES
def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(*SMALL, "method=sft", f"train.engine={engine}")
    spoil_gradient(monkeypatch, run.id, 2)
    base = load_base(run.config)
    error = failed(run, tmp_path, base)
    assert (error.details["what"], error.details["step"]) == ("gradient norm", 2)
    assert isinstance(error.details["values"]["loss"], float)
    assert error.details["rows"] == [row.id for row in batches(run, base)[1]]


@ENGINES
def test_weights_that_are_not_finite_are_found_though_loss_and_gradient_are(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last step of all, after which no loss would tell."""
    end = recorder.Recorder.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.trained[1].data.view(-1)[-1] = math.inf
        end(self, args, state, *more, **kwargs)

    monkeypatch.setattr(recorder.Recorder, "on_step_end", on_step_end)
    run = run_of(*SMALL, "method=sft", f"train.engine={engine}")
    error = failed(run, tmp_path, load_base(run.config))
    assert (error.details["what"], error.details["step"], error.details["value"]) == ("largest weight", 3, "inf")
    assert all(isinstance(error.details["values"][name], float) for name in ("loss", "gradient norm"))
    assert RunDir(tmp_path, run.id).train_record() is None
    monkeypatch.undo()
    assert len(trained(run, tmp_path)["loss"]) == 3


def test_the_norm_of_the_metrics_is_that_before_clipping(tmp_path: Path) -> None:
    runs = [run_of(*SMALL, "method=sft", f"train.max_grad_norm={most}") for most in ("1e-3", "1e3")]
    base = load_base(runs[0].config)
    for run in runs:
        trained(run, tmp_path, base)
    clipped, free = (lines(tmp_path, run)[0]["grad_norm"] for run in runs)
    assert clipped == pytest.approx(free, rel=1e-5)
    assert clipped > 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_weight_that_is_not_finite_is_seen_among_all(value: float, dtype: torch.dtype) -> None:
    weights = [torch.ones(3, 4), torch.zeros(2, 2, dtype=dtype), torch.full((5,), -7.0)]
    assert numerics.largest(weights) == 7
    weights[1][1, 0] = value
    assert not math.isfinite(numerics.largest(weights))


def test_a_message_names_some_of_many_rows() -> None:
    rows = [TokenizedPair(f"train:{i}", [1], [2], [3]) for i in range(16)]
    with pytest.raises(
        TrainingFailed, match=r"^the loss is nan at step 7; it had rows train:0, .*train:7, ... \(16\)$"
    ):
        numerics.check(7, {"loss": math.nan, "gradient norm": 1.0}, rows, [])
    numerics.check(7, {"loss": 0.5, "gradient norm": 1.0}, rows, [math.nan] * 16)  # the loss of the batch decides


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_each_line_of_the_metrics_has_the_rows_of_its_step_and_the_loss_of_each(method: str, tmp_path: Path) -> None:
    words = (*SMALL, f"method={method}", "train.learning_rate=1e-2", "seed=3")
    run = run_of(*words)
    base = load_base(run.config)
    for name, more in (("one", "train.micro_batch_tokens=4000"), ("many", "train.micro_batch_tokens=150")):
        trained(run_of(*words, more), tmp_path / name, base)
    pairs = base.shared.split[1].pairs if base.shared.split else []
    order = sample_order(len(pairs), 12, 3)
    for at, (one, many) in enumerate(zip(lines(tmp_path / "one", run), lines(tmp_path / "many", run), strict=True)):
        rows = batches(run, base)[at]
        assert one["rows"] == [row.id for row in rows] == [pairs[i].id for i in order[at * 4 : at * 4 + 4]]
        assert one["row_losses"] == pytest.approx(many["row_losses"], rel=1e-4)
        share = [len(row.chosen) if method == "sft" else 1 for row in rows]
        mean = sum(s * loss for s, loss in zip(share, one["row_losses"], strict=True)) / sum(share)
        assert mean == pytest.approx(one["loss"], rel=1e-5)
        assert len(set(one["row_losses"])) == 4 or (method, at) == ("dpo", 0)
        assert sum(one["row_tokens"]) == one["tokens"] - (lines(tmp_path / "one", run)[at - 1]["tokens"] if at else 0)


def test_trls_engine_names_the_rows(tmp_path: Path) -> None:
    ours, theirs = (run_of(*SMALL, "method=sft", f"train.engine={engine}") for engine in ("packed", "trl"))
    base = load_base(ours.config)
    for run in (ours, theirs):
        trained(run, tmp_path, base)
    for one, two in zip(lines(tmp_path, ours), lines(tmp_path, theirs), strict=True):
        assert (one["rows"], one["row_tokens"]) == (two["rows"], two["row_tokens"])
        assert "row_losses" not in two


def test_trackers_are_given_numbers_alone(tmp_path: Path) -> None:
    run, found = run_of(*SMALL, "method=dpo"), []
    train(run, RunDir(tmp_path, run.id), load_base(run.config), lambda metrics, step: found.append(metrics))
    assert len(found) == 3
    assert {type(value) for metrics in found for value in metrics.values()} <= {int, float}


def test_a_run_of_a_pack_whose_gradient_is_not_finite_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block mask for all in a row: nothing times what is no number is no number."""
    runs = runs_of(*SMALL, "method=sft", "train.pack_runs=3", "train.attention=flex", "seed=0,1,2")
    base = load_base(runs[0].config)
    alone = [trained(run, tmp_path / "alone", base)["loss"] for run in runs[1:]]
    real = packed.PackedSFT.loss

    def loss(self: Any, scores: torch.Tensor, *more: Any) -> torch.Tensor:
        spoiled = self.args.seed == 0 and self.state.global_step == 1
        return real(self, scores + (scores * 0).sqrt() if spoiled else scores, *more)  # of infinite slope

    monkeypatch.setattr(packed.PackedSFT, "loss", loss)
    assert not Worker(tmp_path / "pack", "sweep", ("train",)).work(runs)
    bad, *fine = (RunDir(tmp_path / "pack", run.id) for run in runs)
    assert ((bad.failure() or {})["what"], (bad.failure() or {})["step"]) == ("gradient norm", 2)
    for directory, losses in zip(fine, alone, strict=True):
        assert (directory.train_record() or {})["loss"] == pytest.approx(losses, rel=1e-5)


def test_a_sweep_goes_on_without_the_run_that_diverged_and_tries_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_of(*SMALL, "method=sft", "seed=0,1,2")
    spoil_gradient(monkeypatch, runs[1].id, 2)
    assert not Worker(tmp_path, "sweep", ("train",)).work(runs)
    directories = [RunDir(tmp_path, run.id) for run in runs]
    assert [directory.train_record() is not None for directory in directories] == [True, False, True]
    failure = read_json(directories[1].path / "failed.json") or {}
    made = lines(tmp_path, runs[1])
    assert (failure["kind"], failure["step"], failure["what"]) == ("failed", 2, "gradient norm")
    assert failure["rows"] == made[1]["rows"]
    assert failure["reason"].startswith(f"TrainingFailed: the gradient norm is {failure['value']} at step 2; it had")
    assert not Worker(tmp_path, "sweep", ("train",)).work(runs)
    assert len(directories[1].history()) == 2
    monkeypatch.undo()
    assert Worker(tmp_path, "sweep", ("train",)).work(runs)
    assert directories[1].failure() is None
    trained(runs[1], tmp_path / "alone")
    assert (directories[1].train_record() or {})["loss"] == (
        RunDir(tmp_path / "alone", runs[1].id).train_record() or {}
    )["loss"]


def hh_mirror(folder: Path, **rows: list[tuple[str, str, str]]) -> None:
    """A mirror of HH-RLHF that holds these rows for the rules: prompt, chosen, rejected."""
    for rule, some in rows.items():
        place = folder / "Anthropic" / "hh-rlhf" / f"{rule}-base"
        place.mkdir(parents=True)
        text = "".join(
            json.dumps({name: f"\n\nHuman: {prompt}\n\nAssistant: {response}" for name, response in pair.items()})
            + "\n"
            for prompt, chosen, rejected in some
            for pair in [{"chosen": chosen, "rejected": rejected}]
        )
        for split in ("train", "test"):
            (place / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


@pytest.fixture
def model_that_drops_zero_width_blanks(tmp_path: Path) -> str:
    """The folder of a model whose tokenizer makes nothing of U+200B."""
    folder = tmp_path / "model"
    shutil.copytree(load_base(run_of(*SMALL, "method=sft").config).folder, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_rows_without_a_response_are_left_out_or_fail_the_run_by_name_before_it_begins(
    method: str, model_that_drops_zero_width_blanks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A response that is empty in the data is left out and named; one that no token is left of fails the run."""
    good = [(f"question {i}?", f"answer {i}", f"other {i}") for i in range(6)]
    harmless = [*good, ("what?", "", "x"), ("what?", "\u200b", "y"), ("what?", "z", "\u200b\u200b")]
    hh_mirror(tmp_path / "mirror", harmless=harmless, helpful=[*good, ("what?", "x", " ")])
    words = [word for word in SMALL if word not in ("dataset=everyday", "train.max_steps=3")]
    bad, fine = runs_of(
        *words, "dataset=hh_rlhf", "preference=harmless,helpful", f"method={method}", "train.max_steps=2",
        "dataset.validation_fraction=0", f"hub.mirror={tmp_path / 'mirror'}", "model.source=hub",
        f"model.hub_id={model_that_drops_zero_width_blanks}", "root=" + str(tmp_path / "outputs"),
    )  # fmt: skip
    assert bad.choices["preference"] == "harmless"
    root = tmp_path / "outputs"
    assert not Worker(root, "sweep", ("train",)).work([bad, fine])
    told = capsys.readouterr().out
    assert "left out, empty response: row train:6" in told
    record = RunDir(root, fine.id).train_record() or {}
    assert record["data"]["counts"]["dropped_rows"] == {"empty response": ["train:6"]}
    rows = "rows train:7, train:8" if method == "dpo" else "row train:7"
    reason = (RunDir(root, bad.id).failure() or {})["reason"]
    assert f"Anthropic/hh-rlhf: {rows}: nothing of a response is left to be scored" in reason
    assert not RunDir(root, bad.id).attempt.exists()
    shutil.rmtree(tmp_path / "mirror")
    hh_mirror(tmp_path / "mirror", harmless=good, helpful=[*good, ("what?", "x", " ")])
    assert Worker(root, "sweep", ("train",)).work([bad, fine])


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(96 + i) if i > 2 else " " if i == 2 else "" for i in ids)


@pytest.mark.parametrize(
    ("prompt", "response", "is_fine"),
    [([5], [5, 1], True), ([5], [1], False), ([5], [], False), ([5], [2, 1], False), ([], [5, 1], False),
     ([], [5, 6, 1], True), ([5], [5], True)],
)  # fmt: skip
def test_a_sample_is_fine_if_text_of_its_responses_is_scored(
    prompt: list[int], response: list[int], is_fine: bool
) -> None:
    other = [7, 8, 9, 1]
    rows = [TokenizedPair("train:1", [5], other, other), TokenizedPair("train:2", prompt, other, response)]
    check_scored(rows, Letters(), "data", both=False)
    if is_fine:
        check_scored(rows, Letters(), "data", both=True)
        return
    with pytest.raises(InputError, match=r"^data: row train:2: nothing of a response"):
        check_scored(rows, Letters(), "data", both=True)
    swapped = [TokenizedPair(row.id, row.prompt, row.rejected, row.chosen) for row in rows]
    with pytest.raises(InputError, match=r"^data: row train:2: nothing of a response"):
        check_scored(swapped, Letters(), "data", both=False)
