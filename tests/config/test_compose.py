"""Composition by swapping options equals what Hydra composes, for every option and value."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from sweeping import expand, faults, one_fault, setting, shipped, trained, write_option

from peft_align.config.compose import ConfigSpace, config_dir
from peft_align.config.schema import GROUPS
from peft_align.errors import InputError
from peft_align.grid.runs import Run

SAMPLED, SEED = 50, 20240501
MODEL = """
source: hub
hub_id: {hub_id}
revision: null
template: vicuna
shape: {{layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocabulary: 384, tied: true}}
"""


def by_hydra(*overrides: str, user: Path | None = None) -> dict[str, Any]:
    """What Hydra itself composes."""
    searchpath = [f"hydra.searchpath=[file://{user}]"] if user else []
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = OmegaConf.to_container(compose("config", [*searchpath, *overrides]), resolve=True)
    assert isinstance(composed, dict)
    return {str(key): v for key, v in composed.items()}


def assert_equal(run: Run, expected: dict[str, Any]) -> None:
    """Each group holds Hydra's values, beside them nothing but the schema's defaults."""
    ours = dataclasses.asdict(run.config)
    assert set(ours) == set(expected)
    for name, node in expected.items():
        if not isinstance(node, dict):
            assert ours[name] == node
            continue
        defaults = {f.name: f.default for f in dataclasses.fields(getattr(run.config, name))}
        assert {key: ours[name][key] for key in node} == node, name
        further = {key: v for key, v in ours[name].items() if key not in node}
        assert further == {key: defaults[key] for key in further}, name


def test_sampled_runs_of_full_equal_hydras() -> None:
    runs = trained(expand("+grid=full"))
    for run in random.Random(SEED).sample(runs, SAMPLED):
        words = [f"{group}={run.choices[group]}" for group in GROUPS]
        words += [f"{key}={value}" for key, value in run.axes.items() if "." in key]
        for key in ("train.checkpoint_steps", "evaluation.steps", "evaluation.benchmarks", "evaluation.heldout_split"):
            words.append(f"{key}={str(setting(run, key)).replace(chr(39), '')}")
        assert_equal(run, by_hydra(*words, f"seed={run.config.seed}"))


@pytest.mark.parametrize(
    "words",
    [
        ["peft.r=8"],
        ["train.max_steps=10"],
        ["method=dpo", "method.beta=0.2"],
        ["method=dpo", "peft=lora", "peft.r=8", "train.max_steps=30", "method.beta=0.5", "seed=3"],
        ["method=dpo", "method.adapter.r=4", "method.optimization.learning_rate=1e-6"],
        ["peft=lora", "peft.compute_dtype=fp32"],
        ["train.checkpoint_steps=[2,4]", "train.adam_betas=[0.8,0.9]", "peft.target_modules=[k_proj]"],
        ["train.warmup_steps=${train.max_steps}", "train.max_steps=5"],
        ["peft.r=${train.batch_size}", "train.batch_size=4"],
        ["peft.target_modules=${method.adapter.target_modules}", "method=dpo"],
        ["model.hub_id='my-${seed}'", "seed=4"],
        ["tracker=wandb", "tracker.project=mine", "hub.mirror=/somewhere", "root=elsewhere", "launcher.workers=2"],
        ["evaluation.limit=4", "evaluation.benchmarks=[mmlu]", "dataset=everyday", "preference=mixture"],
        ["model=tiny", "model.shape.layers=3", "model.revision='1e5'"],
    ],
    ids=" ".join,
)
def test_overrides_give_what_they_give_in_hydra(words: list[str]) -> None:
    assert_equal(trained(expand(*words, space=ConfigSpace()))[0], by_hydra(*words))


def test_an_interpolation_given_for_a_setting_is_resolved_for_each_run() -> None:
    words = ["peft.r=${train.batch_size}", "train.batch_size=4,8"]
    runs = trained(expand(*words, space=ConfigSpace()))
    assert [(run.config.train.batch_size, run.config.peft.r) for run in runs] == [(4, 4), (8, 8)]


def test_text_around_an_interpolation_is_resolved_for_each_run(tmp_path: Path) -> None:
    write_option(tmp_path, "model/per_seed", MODEL.format(hub_id="mine/model-${seed}"))
    runs = trained(expand("model=per_seed", "seed=0,1", space=ConfigSpace([tmp_path])))
    assert [run.config.model.hub_id for run in runs] == ["mine/model-0", "mine/model-1"]


def test_a_users_option_equals_hydras(tmp_path: Path) -> None:
    write_option(tmp_path, "model/mine", MODEL.format(hub_id="mine/model"))
    write_option(tmp_path, "method/gentle_dpo", "defaults: [dpo, _self_]\nbeta: 0.01\nadapter: {r: 4}\n")
    space = ConfigSpace([tmp_path])
    assert {"mine", "tiny"} <= set(space.options("model"))
    run = trained(expand("model=mine", "method=gentle_dpo", "seed=1", space=space))[0]
    assert_equal(run, by_hydra("model=mine", "method=gentle_dpo", "seed=1", user=tmp_path))
    assert (run.config.peft.r, run.config.model.hub_id) == (4, "mine/model")


@pytest.mark.parametrize("name", ["with space", "with, comma", "with (brackets)", "it's mine", "a=b"])
def test_a_users_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    write_option(tmp_path / name, "model/mine", MODEL.format(hub_id="mine/model"))
    run = trained(expand("model=mine", space=ConfigSpace([tmp_path / name])))[0]
    assert run.config.model.hub_id == "mine/model"


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in shipped().options(g)])
def test_every_shipped_option_is_valid(group: str, option: str) -> None:
    beside = {"preference": ["dataset=beavertails"], "merge": ["+grid=merge", "method=sft", "model=mistral_7b"]}
    if (group, option) == ("merge", "none"):
        beside = {}
    kind = "merge" if group in beside and group == "merge" else "train"
    runs = [run for run in expand(f"{group}={option}", *beside.get(group, [])).runs if run.kind == kind]
    assert runs[0].choices[group] == option


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "flow"),
        ("[1, 2]", "a mapping is expected"),
        ("", "is missing"),
        (MODEL.format(hub_id="x/y") + "colour: red\n", "model.colour: no such key"),
        (MODEL.format(hub_id="${nothing.here}"), "refers to a setting that does not exist"),
        (MODEL.format(hub_id="${model.hub_id}"), "refers to itself"),
        ("# @package train\n" + MODEL.format(hub_id="x/y"), "model"),
    ],
    ids=["broken", "list", "empty", "unknown key", "dangling", "circular", "another group's package"],
)
def test_a_users_option_that_cannot_be_used_is_a_fault(tmp_path: Path, text: str, message: str) -> None:
    write_option(tmp_path, "model/mine", text)
    assert any(message in fault for fault in faults("model=mine", space=ConfigSpace([tmp_path])))


def test_hydras_own_overrides_are_checked_each_by_itself() -> None:
    space = ConfigSpace(hydra_overrides=["hydra.vrbose=1", "hydra.verbose=true", "hydra.nothing=2"])
    assert [fault.where for fault in space.faults] == ["hydra.vrbose=1", "hydra.nothing=2"]


def test_numbers_in_an_option_outside_the_composition_are_read_as_omegaconf_does(tmp_path: Path) -> None:
    write_option(tmp_path, "grid/numbers", "blocks: [{axes: {train.learning_rate: [5e-5]}}]\n")
    loaded = ConfigSpace([tmp_path]).load("grid", "numbers")
    assert loaded["blocks"][0]["axes"]["train.learning_rate"] == [5.0e-5]


def test_an_option_that_does_not_exist_is_told_with_its_neighbours() -> None:
    assert "did you mean 'quickstart'?" in one_fault("+grid=quikstart")
    with pytest.raises(InputError, match="no such option"):
        shipped().load("benchmark", "nothing")
