"""A run is named after its science: scientific settings change the id, operational ones never do."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from sweeping import expand, ids, trained

from peft_align.config.compose import Built, canonical
from peft_align.config.identity import base_label, baseline_id, merge_id, slug, train_id
from peft_align.config.schema import GROUPS, Config
from peft_align.config.validate import Leaf, leaves
from peft_align.grid.runs import Run

NAMES = {"dataset": "everyday", "preference": "harmless", "model": "mistral_7b", "peft": "lora", "train": "default"}
FEEDERS = ("method.adapter.", "method.optimization.")  # only read by peft/ and train/, whose values count


def example(kind: str) -> Config:
    """A run's config."""
    return trained(expand("model=mistral_7b", "dataset=everyday", "peft=lora", f"method={kind}", "tracker=wandb"))[
        0
    ].config


def merges(option: str, *words: str) -> list[Run]:
    """The one merge of two runs that these words leave of the shipped grid."""
    sweep = expand("+grid=merge", "model=mistral_7b", "seed=0", "method=sft", f"merge={option}", *words)
    return [run for run in sweep.runs if run.kind == "merge"]


def judge(option: str) -> Any:
    """The settings of a shipped judge."""
    return trained(expand("model=tiny", f"judge={option}"))[0].config.judge


EXAMPLES = {kind: example(kind) for kind in ("sft", "dpo")}
MERGES = {"slerp": "slerp", "arithmetic": "dare_ties"}  # an option of each kind of merge
JUDGED = {  # an option of each kind of judge
    "openai": "gpt4",
    "causal_lm": "local_lm",
    "classifier": "toxicity_model",
}
JUDGES = {option: judge(option) for option in JUDGED.values()}


def name_of(config: Config, parents: tuple[str, ...] = ()) -> str:
    """The id of a training run with this config."""
    parts = {g: Built(v, {}, canonical(type(v), v)) for g in GROUPS if (v := getattr(config, g))}
    if config.merge.kind != "none":
        return merge_id(config, parts["merge"], ["sft"], parents or ("a", "b"))
    return train_id(config, parts, NAMES | {"method": config.method.kind}, parents)


def digits(run_id: str) -> str:
    """The hash of an id, without the readable part."""
    return run_id.rpartition("-")[2]


def changed(value: Any) -> Any:
    """Some other value, allowed or not."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, dict):
        return value | {"other": 1}
    if isinstance(value, list):
        return [*value, changed(value[0])]
    return f"{value}x"


def with_changed(node: Any, path: list[str]) -> Any:
    """The dataclass with one nested value changed."""
    old = getattr(node, path[0])
    return dataclasses.replace(node, **{path[0]: with_changed(old, path[1:]) if path[1:] else changed(old)})


def run_with(leaf: Leaf) -> Config:
    """An example that has the setting."""
    if leaf.key.startswith("method.") and leaf.kinds is not None:
        return EXAMPLES[min(leaf.kinds)]
    if leaf.key.startswith("merge."):
        return merges(MERGES[max((leaf.kinds or frozenset()) & set(MERGES), default="slerp")])[0].config
    if leaf.key.startswith("judge."):
        return dataclasses.replace(EXAMPLES["dpo"], judge=JUDGES[judge_of(leaf)])
    if leaf.key.startswith("launcher."):
        own = trained(expand(f"launcher={launcher_of(leaf)}", "model=tiny", "dataset=everyday"))[0].config.launcher
        return dataclasses.replace(EXAMPLES["dpo"], launcher=own)
    return EXAMPLES["dpo"]


def launcher_of(leaf: Leaf) -> str:
    """An option of conf/launcher/ that has the setting."""
    return max(leaf.kinds or {"local"})


def judge_of(leaf: Leaf) -> str:
    """An option of conf/judge/ that has the setting."""
    return JUDGED[min((leaf.kinds or frozenset()) & set(JUDGED))]


@pytest.mark.parametrize("key", [key for key, leaf in leaves().items() if leaf.scientific])
def test_a_scientific_setting_changes_the_id(key: str) -> None:
    config = run_with(leaves()[key])
    assert digits(name_of(with_changed(config, key.split(".")))) != digits(name_of(config))


@pytest.mark.parametrize("key", [key for key, leaf in leaves().items() if not leaf.scientific])
def test_an_operational_setting_does_not_change_the_id(key: str) -> None:
    config = run_with(leaves()[key])
    assert name_of(with_changed(config, key.split("."))) == name_of(config)


def another(leaf: Leaf, value: Any) -> Any:
    """Another value that the schema allows; None if there is none."""
    special = {
        "preference.rule": "helpful",
        "dataset.expected_rows": "{harmless:7}",
        "preference.loaders": ["everyday", "other"],
        "evaluation.steps": [1],
        "resources.time": "4:00:00",
        "resources.setup": ["date"],
        "resources.extra": ["--exclusive"],
        "resources.rules": "[{where:{stage:judge},set:{gpus:0}}]",
        "merge.space": "delta",
        "merge.weights": [0.25, 0.5],
        "merge.t": 0.25,
        "merge.sparsify": "magnitude",
        "merge.density": 0.25,
        "merge.save_tolerance": 0.5,
        "evaluation.benchmarks": ["preference"],
        "train.adam_betas": [0.5, 0.5],
        "train.checkpoint_steps": [1],
        "peft.dropout": 0.25,
        "method.adapter.dropout": 0.25,
        "judge.label": "toxic",
        "judge.api_key_env": "OTHER_KEY",
        "judge.version": "other",
        "judge.revision": "other",
        "judge.requests_per_minute": 60,
        "dataset.validation_fraction": 0.25,
        "dataset.license": "mit",
        "model.license": "mit",
    }
    if leaf.key in special:
        return special[leaf.key]
    if leaf.rule.choices:
        return next((choice for choice in leaf.rule.choices if choice != value), None)
    if value is None and "bool" in str(leaf.type):
        return True
    return 2 if value is None and "int" in str(leaf.type) else changed(value)


def word(key: str, value: Any) -> str:
    """An override as people write it."""
    shown = f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return (
        f"{key}='{shown}'"
        if ":" in shown and shown[0] not in "[{"
        else f"{key}={shown.lower() if isinstance(value, bool) else shown}"
    )


def pinned(config: Config) -> dict[str, str]:
    """Overrides that hold what peft/ and train/ read from the method."""
    read = ("r", "alpha", "dropout", "target_modules"), ("learning_rate", "weight_decay", "max_grad_norm", "schedule")
    groups = {"peft": (config.peft, read[0]), "train": (config.train, read[1])}
    keys = {f"{group}.{name}": getattr(node, name) for group, (node, names) in groups.items() for name in names}
    return {key: word(key, value) for key, value in keys.items()}


ON_COMMAND_LINE = [key for key in leaves() if not key.endswith(".kind")]


@pytest.mark.parametrize("key", ON_COMMAND_LINE)
def test_on_the_command_line_the_id_follows_science_alone(key: str) -> None:
    leaf = leaves()[key]
    config = run_with(leaf)
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    base = {"model": "model=mistral_7b", "dataset": "dataset=everyday", "method": f"method={config.method.kind}"}
    base |= {"peft": "peft=lora", "tracker": "tracker=wandb"} | pinned(config)
    base |= {"judge": f"judge={judge_of(leaf)}"} if key.startswith("judge.") else {}
    base |= {"launcher": f"launcher={launcher_of(leaf)}"} if key.startswith("launcher.") else {}
    new = another(leaf, value)
    if key.startswith("merge."):
        option = MERGES[config.merge.kind]
        before, after = ({run.id for run in merges(option, *words)} for words in ([], [word(key, new)]))
    else:
        before, after = (ids(expand(*words.values())) for words in (base, base | {key: word(key, new)}))
    assert len(before) == len(after) == 1
    assert (before != after) == leaf.scientific


@pytest.mark.parametrize("key", [key for key in leaves() if key.startswith("model.shape.")])
def test_the_shape_of_a_model_of_random_weights_is_what_it_is(key: str) -> None:
    words = ("model=tiny", "peft=lora", "dataset=everyday")
    value = getattr(trained(expand(*words))[0].config.model.shape, key.rpartition(".")[2])
    one, other = expand(*words), expand(*words, word(key, changed(value)))
    assert ids(one).isdisjoint(ids(other))
    assert {run.id for run in one.runs}.isdisjoint(run.id for run in other.runs)  # the baseline's too


@pytest.mark.parametrize("words", [["method.adapter.r=4"], ["method.optimization.learning_rate=1e-3"]])
def test_what_a_method_gives_to_other_groups_counts_there(words: list[str]) -> None:
    assert ids(expand("model=tiny", *words)) != ids(expand("model=tiny"))
    feeding = [key for key in leaves() if key.startswith(FEEDERS)]
    assert feeding
    assert not any(leaves()[key].scientific for key in feeding)


@pytest.mark.parametrize(
    "word", ["launcher=local", "tracker=wandb", "root=elsewhere", "hub.mirror=/x", "judge=gpt4", "evaluation=paper"]
)
def test_where_and_how_a_sweep_runs_is_not_part_of_the_id(word: str) -> None:
    assert ids(expand("model=tiny", word)) == ids(expand("model=tiny"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate=0.0001"),
        ("peft.alpha=16", "peft.alpha=16.0"),
        ("train.max_steps=8", "train.max_steps=8.0"),
        ("train.weight_decay=0", "train.weight_decay=-0.0"),
        ("model.revision=123", "model.revision='123'"),
        ("peft.r=64", "peft.r=${method.adapter.r}"),
    ],
)
def test_another_way_to_write_the_same_value_is_the_same_run(one: str, other: str) -> None:
    assert ids(expand(one)) == ids(expand(other))


def test_the_hash_is_of_the_content_not_of_the_options_names() -> None:
    named = trained(expand("peft=qlora"))[0]
    spelled = trained(expand("peft=lora", "peft.base_precision=nf4", "peft.double_quantization=true"))[0]
    assert digits(named.id) == digits(spelled.id)


def test_parents_are_part_of_the_id_in_their_order() -> None:
    config = EXAMPLES["dpo"]
    names = [name_of(config, parents) for parents in ((), ("a",), ("b",), ("a", "b"), ("b", "a"))]
    assert len({digits(name) for name in names}) == len(names)
    assert "-sft_dpo-" in names[1]


def test_an_id_is_a_readable_slug_and_twelve_hex_digits() -> None:
    run_id = name_of(EXAMPLES["dpo"])
    assert re.fullmatch(r"everyday-harmless-dpo-mistral_7b-lora-s0-[0-9a-f]{12}", run_id)


def test_a_slug_is_a_safe_folder_name() -> None:
    assert slug(["a/b", "c d", "é..", "x" * 200]) == f"a_b-c_d-_-{'x' * 200}"[:100]


def test_a_baseline_is_its_model_and_the_precision_of_its_base_alone() -> None:
    config = EXAMPLES["dpo"]
    name = baseline_id(config, NAMES)
    same = dataclasses.replace(config, seed=5, method=EXAMPLES["sft"].method)
    same = dataclasses.replace(same, peft=dataclasses.replace(config.peft, r=1, alpha=1.0, adapter_dtype="bf16"))
    assert baseline_id(same, NAMES) == name
    for other in (
        dataclasses.replace(config, model=dataclasses.replace(config.model, revision="v2")),
        dataclasses.replace(config, peft=dataclasses.replace(config.peft, base_precision="nf4")),
        dataclasses.replace(config, peft=dataclasses.replace(config.peft, compute_dtype="fp32")),
    ):
        assert baseline_id(other, NAMES) != name
    assert name.startswith("baseline-mistral_7b-bf16-")


@pytest.mark.parametrize(
    ("base", "compute", "label"),
    [("bf16", "bf16", "bf16"), ("fp32", "fp32", "fp32"), ("nf4", "bf16", "nf4"), ("nf4", "fp32", "nf4_fp32")],
)
def test_the_label_of_a_base_names_its_precision(base: str, compute: str, label: str) -> None:
    peft = dataclasses.replace(EXAMPLES["dpo"].peft, base_precision=base, compute_dtype=compute)
    assert base_label(peft) == label
