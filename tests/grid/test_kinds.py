"""The kinds of run that plan tells memory and time of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sweeping import expand, finish_training, plan, trained

from peft_align.grid.cost import measured
from peft_align.grid.footprint import choice
from peft_align.grid.kinds import about, kinds_of, lines
from peft_align.grid.runs import Sweep


def kinds(root: Path, sweep: Sweep) -> list[dict[str, Any]]:
    """The kinds of a sweep's training runs, with what was measured under a root."""
    items = plan(sweep, root)
    return kinds_of(items, measured(root, items))


def test_runs_that_differ_in_data_and_seed_are_of_one_kind(tmp_path: Path) -> None:
    words = ("model=mistral_7b", "peft=qlora", "method=sft,dpo", "seed=0,1,2", "dataset=hh_rlhf,beavertails")
    entries = kinds(tmp_path, expand(*words))
    assert [(entry["method"], entry["runs"]) for entry in entries] == [("sft", 6), ("dpo", 6)]
    assert all(entry["settings"] == {} for entry in entries)


def test_kinds_of_one_name_are_told_apart_by_the_settings_that_differ(tmp_path: Path) -> None:
    words = ("model=mistral_7b", "method=dpo", "peft=lora", "train.max_length=256,512", "train.learning_rate=1e-4,2e-4")
    entries = kinds(tmp_path, expand(*words))
    assert [entry["settings"] for entry in entries] == [{"train.max_length": 256}, {"train.max_length": 512}]
    shown, left = lines(entries, 1)
    assert shown[0].startswith("mistral_7b dpo lora r=16 max_length=256   ")
    assert left == 1


def test_models_of_one_size_share_a_line_and_not_an_entry(tmp_path: Path) -> None:
    entries = kinds(tmp_path, expand("model=llama_7b,vicuna_7b", "peft=qlora"))
    assert len(entries) == 2
    (line,), left = lines(entries, 5)
    assert line.startswith("llama_7b|vicuna_7b sft qlora r=64   ")
    assert left == 0


def test_a_line_says_memory_both_ways_the_card_and_the_time(tmp_path: Path) -> None:
    words = ("model=mistral_7b", "method=dpo", "peft=qlora", "train.engine=packed", "train.micro_batch_tokens=2048")
    for given, other in (("false", "with"), ("true", "without")):
        (entry,) = kinds(tmp_path, expand(*words, f"train.gradient_checkpointing={given}"))
        (line,), _ = lines([entry], 1)
        kept, recomputed = (f"{entry['peak_bytes'][way] / 1e9:.1f} GB" for way in ("kept", "recomputed"))
        mine, others = (kept, recomputed) if given == "false" else (recomputed, kept)
        assert f" {mine} at 2,048 tokens ({others} {other} gradient checkpointing)" in line
        assert entry["peak_bytes"]["kept"] > 3 * entry["peak_bytes"]["recomputed"]
        assert f"fits {entry['fits_gb']} GB   up to ~" in line
        assert line.endswith(" on an A100")
        assert sum(entry["bytes"].values()) - entry["peak_bytes"]["kept" if given == "false" else "recomputed"] < 5


def test_a_run_that_fits_no_card_says_what_makes_it_fit(tmp_path: Path) -> None:
    words = ("model=mistral_7b", "method=dpo", "peft=lora", "train.max_length=8192", "train.batch_size=16")
    words = (*words, "train.engine=trl")
    (entry,) = kinds(tmp_path, expand(*words, "train.micro_batch_size=16"))
    assert entry["fits_gb"] is None
    assert entry["advice"]["settings"] == ["train.gradient_checkpointing=true", "train.micro_batch_size=4"]
    (line,), _ = lines([entry], 1)
    assert "fits no card" in line
    assert line.endswith(f"fits {entry['advice']['fits_gb']} GB with " + " ".join(entry["advice"]["settings"]))
    (run,) = trained(expand(*words, *entry["advice"]["settings"]))
    assert choice(run.config, entry["advice"]["fits_gb"])


def test_what_the_engine_decides_is_told_for_each_card(tmp_path: Path) -> None:
    words = ("model=mistral_7b", "method=dpo", "peft=qlora", "train.max_length=1024")
    (entry,) = kinds(tmp_path, expand(*words))
    assert entry["gradient_checkpointing"] is None
    assert entry["tokens_at_once"] == 2048
    assert [found["recomputed"] for found in entry["cards"].values()] == [True, False, False]
    (line,), _ = lines([entry], 1)
    assert "fits 24 GB with gradient checkpointing   up to ~" in line
    assert entry["seconds"]["A100-80GB"] == entry["seconds"]["A100-40GB"]


def test_where_nothing_helps_nothing_is_advised(tmp_path: Path) -> None:
    hopeless = ("model=mistral_7b", "model.shape.layers=4000")
    (entry,) = kinds(tmp_path, expand(*hopeless))
    assert (entry["fits_gb"], entry["advice"]) == (None, None)
    assert "fits no card" in lines([entry], 1)[0][0]


def test_what_like_runs_took_counts_more_than_what_is_computed(tmp_path: Path) -> None:
    words = ("model=tiny", "dataset=everyday", "train.max_steps=10", "train.batch_size=2", "seed=0,1", "peft.r=8,16")
    sweep = expand(*words)
    (entry, _) = kinds(tmp_path, sweep)
    assert (entry["measured_seconds"], entry["tokens_measured"]) == (None, False)
    assert entry["tokens_per_sample"] == 512
    finish_training(tmp_path, trained(sweep)[0], seconds_per_step=6.0, tokens=2000, samples=20)
    for entry in kinds(tmp_path, sweep):  # rank is no matter
        assert (entry["measured_seconds"], entry["tokens_per_sample"]) == (60.0, 100)
        assert lines([entry], 1)[0][0].endswith("1 min 00 s as measured")
    (other,) = kinds(tmp_path, expand(*words[:-2], "peft=qlora"))
    assert other["measured_seconds"] is None


def test_the_pace_of_one_engine_says_nothing_of_the_other(tmp_path: Path) -> None:
    sweep = expand("model=tiny", "dataset=everyday", "train.engine=packed,trl")
    packed, trl = (next(run for run in trained(sweep) if run.config.train.engine == name) for name in ("packed", "trl"))
    finish_training(tmp_path, packed, seconds_per_step=1.0)
    entries = kinds(tmp_path, sweep)
    measured = {entry["settings"]["train.engine"]: entry["measured_seconds"] for entry in entries}
    assert measured == {"packed": trl.config.train.max_steps, "trl": None}


def test_modules_that_are_not_known_make_memory_unknown_and_nothing_fail(tmp_path: Path) -> None:
    (entry,) = kinds(tmp_path, expand("model=tiny", "peft.target_modules=[lm_head]"))
    assert entry["peak_bytes"] is None
    assert "memory unknown" in lines([entry], 1)[0][0]


def test_times_are_told_in_two_digits_or_so() -> None:
    assert [about(x) for x in (3, 2100, 7000, 86400, 400_000)] == ["1 min", "35 min", "2 h", "24 h", "5 days"]


def test_a_row_that_is_too_long_for_every_card_is_advised_against_also_where_the_engine_would_recompute(
    tmp_path: Path,
) -> None:
    words = ("model=mistral_7b", "method=dpo", "peft=lora", "train.max_length=4096", "train.engine=packed")
    (entry,) = kinds(tmp_path, expand(*words, "train.micro_batch_tokens=131072"))
    assert entry["fits_gb"] is None
    assert entry["advice"]["settings"][0].startswith("train.micro_batch_tokens=")
    (run,) = trained(expand(*words, *entry["advice"]["settings"]))
    assert choice(run.config, entry["advice"]["fits_gb"])
