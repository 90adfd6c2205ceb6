"""Merges equal mergekit's on the same adapters: our saved models against its output on the inputs merged by PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
# Learning rates that leave adapters large enough for two merges to be told apart; ranks and modules differ.
GRID = """
blocks:
  - name: inputs
    axes: &axes {method: [sft, dpo], preference: [harmless, helpful]}
    when: &ranks
      - where: {method: sft}
        set: {peft.r: 4, peft.target_modules: [q_proj, v_proj, up_proj], train.learning_rate: 0.05}
      - where: {method: dpo}
        set: {peft.r: 8, train.learning_rate: 0.02}
    set: &tiny
      model: tiny
      dataset: everyday
      peft: lora
      peft.compute_dtype: fp32
      train.max_steps: 3
      train.batch_size: 2
      train.max_length: 200
      evaluation.benchmarks: [preference]
      evaluation.heldout: 2
  - name: two
    kind: merge
    axes: {merge: [slerp, linear, task_arithmetic, ties, dare_ties, dare_linear]}
    inputs:
      - [{method: sft, preference: harmless}, {method: dpo, preference: helpful}]
    when: &merges
      - {where: {merge: slerp}, axes: {merge.space: [delta, weights], merge.t: [0.3]}}
      - {where: {merge: task_arithmetic}, set: {merge.scaling: 0.7, merge.weights: [0.5, 1.5]}}
      - {where: {merge: linear}, set: {merge.weights: [0.5, 1.5]}}
      - {where: {merge: ties}, set: {merge.density: 0.6, merge.weights: [0.5, 1.5]}}
      - {where: {merge: [dare_ties, dare_linear]}, set: {merge.density: 1.0, merge.weights: [0.4, 0.9]}}
      - where: {method: sft}
        set: {peft.r: 4, peft.target_modules: [q_proj, v_proj, up_proj], train.learning_rate: 0.05}
      - {where: {method: dpo}, set: {peft.r: 8, train.learning_rate: 0.02}}
    set: &saved {<<: *tiny, merge.save: full}
  - name: four
    kind: merge
    axes: {merge: [ties, dare_ties]}
    inputs:
      - - {method: sft, preference: harmless}
        - {method: sft, preference: helpful}
        - {method: dpo, preference: harmless}
        - {method: dpo, preference: helpful}
    when: *ranks
    set: {<<: *saved, merge.density: 1.0}
baselines: false
"""
# What mergekit calls our parameters.
METHODS = {
    ("none", False): "task_arithmetic",
    ("magnitude", True): "ties",
    ("random", True): "dare_ties",
    ("random", False): "dare_linear",
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merges and their inputs, made by the command line."""
    folder = tmp_path_factory.mktemp("merges")
    (folder / "mine/grid").mkdir(parents=True)
    (folder / "mine/grid/merges.yaml").write_text(GRID)
    command = [sys.executable, "-m", "peft_align.sweep", "--config-dir", "mine", "+grid=merges"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return folder


def records(sweep: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((sweep / "outputs/runs").glob("*/merge.json"))]
    assert len(found) == 9
    return found


@pytest.fixture(scope="module")
def base() -> Path:
    """The tiny model's folder."""
    from sweeping import expand

    from peft_align.models.loading import find_model

    return find_model(expand("model=tiny").runs[0].config.model, None)[0]


@pytest.fixture(scope="module")
def wholes(sweep: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each input as a whole model, merged into the base by PEFT, by run id."""
    found = {}
    for run in sorted((sweep / "outputs/runs").glob("everyday-*")):
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, run / "adapter").merge_and_unload()
        found[run.name] = tmp_path_factory.mktemp("whole")
        model.save_pretrained(found[run.name])
    assert len(found) == 4
    return found


def by_mergekit(record: dict[str, Any], base: Path, models: Sequence[Path], out: Path) -> dict[str, torch.Tensor]:
    """What mergekit makes of the models under the record's parameters."""
    how = record["merge"]
    config: dict[str, Any] = {"dtype": "float32", "base_model": str(base)}
    if how["kind"] == "slerp":
        config |= {"merge_method": "slerp", "base_model": str(models[0]), "parameters": {"t": how["t"]}}
        config["models"] = [{"model": str(model)} for model in models]
    else:
        weights = how["weights"] or [1 / len(models)] * len(models)
        parameters = {"normalize": how["normalize"], "lambda": how["scaling"]}
        config |= {"merge_method": METHODS[how["sparsify"], how["elect_sign"]], "parameters": parameters}
        config["models"] = [
            {"model": str(model), "parameters": {"weight": weight, "density": how["density"]}}
            for model, weight in zip(models, weights, strict=True)
        ]
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(write_model_card=False, quiet=True))
    return weights_of(out)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: v for path in folder.glob("*.safetensors") for name, v in load_file(path).items()}


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    shared = set(ours) & set(theirs)
    assert set(theirs) - shared <= {"lm_head.weight"}  # tied: one of the two names is enough
    return max(float((ours[name] - theirs[name]).abs().max()) for name in shared)


def test_every_merge_equals_mergekits_on_whole_models(
    sweep: Path, base: Path, wholes: dict[str, Path], tmp_path: Path
) -> None:
    plain = weights_of(base)
    for i, record in enumerate(records(sweep)):
        if record["merge"]["kind"] == "slerp" and record["merge"]["space"] == "delta":
            continue  # below
        ours = weights_of(sweep / "outputs/runs" / record["run"] / "merged/full")
        theirs = by_mergekit(record, base, [wholes[parent] for parent in record["parents"]], tmp_path / str(i))
        assert furthest(ours, theirs) < TOLERANCE, record["run"]
        assert furthest(ours, plain) > 100 * TOLERANCE  # the merge does something that could be wrong


def test_every_merge_of_weight_changes_equals_mergekits_on_changes_over_a_zero_base(
    sweep: Path, base: Path, wholes: dict[str, Path], tmp_path: Path
) -> None:
    plain = weights_of(base)
    zero = changes_only(base, {name: torch.zeros_like(v) for name, v in plain.items()}, tmp_path / "zero")
    changed = {
        run: changes_only(base, {n: v - plain[n] for n, v in weights_of(whole).items() if n in plain}, tmp_path / run)
        for run, whole in wholes.items()
    }
    for i, record in enumerate(records(sweep)):
        if record["merge"]["space"] == "weights":
            continue
        ours = weights_of(sweep / "outputs/runs" / record["run"] / "merged/full")
        theirs = by_mergekit(record, zero, [changed[parent] for parent in record["parents"]], tmp_path / str(i))
        assert furthest({name: v - plain[name] for name, v in ours.items()}, theirs) < TOLERANCE, record["run"]


def changes_only(base: Path, weights: dict[str, torch.Tensor], folder: Path) -> Path:
    """A model folder whose weights are these."""
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    save_file({name: v.contiguous() for name, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder
