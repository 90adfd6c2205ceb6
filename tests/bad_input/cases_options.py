"""Option files of the user's own folder (--config-dir): a model, a dataset, a benchmark, resources, a judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bad_input import Case, write

TINY = """
source: random
hub_id: null
revision: null
template: vicuna
shape: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocabulary: 259, tied: true}
"""
DATA = "loader: hh_rlhf\nhub_id: my/pairs\nrevision: null\nvalidation_fraction: 0.05\n"
RESOURCES = "partition: null\nrules: [{where: {stage: train}, set: {gpus: 1}}]\n"


def option(name: str, path: str, text: str | bytes, *told: str, words: Sequence[str] = (), faults: int = 1) -> Case:
    """A file of the folder `conf`; its option `mine` is asked for."""

    def prepare(folder: Path) -> list[str]:
        write(folder / "conf" / path, text)
        own = list(words) or [f"{path.partition('/')[0]}=mine"]
        given = {word.partition("=")[0] for word in own}
        fixed = [word for word in ("model=tiny", "dataset=everyday") if word.partition("=")[0] not in given]
        return ["plan", "--config-dir", "conf", *fixed, *own]

    return Case("options", name, prepare, told, faults=faults)


def model(name: str, text: str | bytes, *told: str, faults: int = 1) -> Case:
    return option(name, "model/mine.yaml", text, *told, faults=faults)


CASES = [
    model(
        "empty file", "", "model.source: is missing (where the weights come from)", "model.shape: is missing", faults=5
    ),
    model("broken YAML", "source: [\n", "model/mine.yaml", "line 2"),
    model("latin-1", TINY.encode() + b"# f\xfcr\n", "model/mine.yaml", "UTF-8"),
    model("a list at the top", "- source: random\n", "model/mine.yaml", "a mapping is expected"),
    model("unknown key", f"{TINY}templat: chat\n", "model.templat: no such key", "'template'?"),
    model("missing key", TINY.replace("template: vicuna\n", ""), "model.template: is missing (how a dialogue"),
    model("wrong type", TINY.replace("layers: 2", "layers: two"), "model.shape.layers: 'two' is not a whole number"),
    model("out of range", TINY.replace("heads: 4", "heads: 0"), "model.shape.heads: 0 is out of range"),
    model("no choice", TINY.replace("vicuna", "vicunna"), "model.template: 'vicunna' is not one of", "'vicuna'?"),
    model("null where a value is due", TINY.replace("random", "null"), "model.source: the value is empty", "hub"),
    model(
        "shape that is a list", TINY.partition("shape")[0] + "shape: [2, 32]\n", "model.shape: a mapping is expected"
    ),
    model(
        "under its group's name",
        "model:\n  source: random\n",
        "model/mine.yaml: its settings stand under 'model:'",
        "at its top",
    ),
    model("written into another group", "# @package train\nmax_steps: 3\n", "model/mine.yaml", "without a package"),
    model(
        "reference to what is not there",
        TINY.replace("vicuna", "${model.templte}"),
        "model.template=${model.templte}: refers to a setting that does not exist",
        "'model.template'?",
    ),
    model("extends what is not there", f"defaults: [tinny, _self_]\n{TINY}", "model/tinny", "tiny"),
    option(
        "ending that is not read",
        "model/mine.yml",
        TINY,
        "model=mine: model has no option 'mine'",
        "rename",
        "mine.yaml",
    ),
    option(
        "folder that is no group",
        "models/mine.yaml",
        TINY,
        "model=mine: model has no option 'mine'",
        words=["model=mine"],
    ),
    option("method of no kind", "method/mine.yaml", "kind: ppo\n", "method.kind: 'ppo' is not a kind of method", "dpo"),
    option("method without its kind", "method/mine.yaml", "beta: 0.1\n", "method.kind", "dpo"),
    option(
        "dataset of no loader",
        "dataset/mine.yaml",
        DATA.replace("hh_rlhf", "hh_rhlf"),
        "dataset.loader: 'hh_rhlf' is not one of its values",
        "'hh_rlhf'?",
        words=["dataset=mine"],
    ),
    option(
        "dataset whose fraction is a percentage",
        "dataset/mine.yaml",
        DATA.replace("0.05", "5"),
        "dataset.validation_fraction: 5 is out of range",
        "at most 0.5",
        words=["dataset=mine"],
    ),
    option(
        "benchmark of no kind",
        "benchmark/mine.yaml",
        "kind: lm_evl\ntask: mmlu\n",
        "benchmark/mine.yaml: kind:",
        "'lm_eval'?",
        words=["evaluation.benchmarks=[mine]"],
    ),
    option(
        "benchmark that is a list",
        "benchmark/mine.yaml",
        "- lm_eval\n",
        "benchmark/mine.yaml",
        "a mapping is expected",
        words=["evaluation.benchmarks=[mine]"],
    ),
    option(
        "suite of an unknown benchmark",
        "evaluation/mine.yaml",
        "defaults: [default, _self_]\nbenchmarks: [mmul]\n",
        "evaluation.benchmarks: mmul",
        "'mmlu'?",
    ),
    option(
        "suite of nothing",
        "evaluation/mine.yaml",
        "defaults: [default, _self_]\nbenchmarks: []\n",
        "evaluation.benchmarks: a list of at least one value is expected",
    ),
    option(
        "suite of null",
        "evaluation/mine.yaml",
        "defaults: [default, _self_]\nbenchmarks: [null]\n",
        "evaluation.benchmarks[0]: the value is empty",
    ),
    option(
        "rule for no stage",
        "resources/mine.yaml",
        "defaults: [default, _self_]\n" + RESOURCES.replace("stage: train", "stage: trian"),
        "resources.rules[0].where.stage",
        "'train'?",
    ),
    option(
        "rule by what no rule can ask",
        "resources/mine.yaml",
        "defaults: [default, _self_]\n" + RESOURCES.replace("stage", "seed"),
        "resources.rules[0].where.seed",
        "stage",
    ),
    option(
        "option of sbatch that is the launcher's",
        "resources/mine.yaml",
        "defaults: [default, _self_]\nextra: [--array=1-3]\n",
        "--array is the launcher's own",
        "launcher.max_array",
    ),
    option(
        "judge whose address is missing",
        "judge/mine.yaml",
        "kind: openai\nmodel: m\n",
        "judge.base_url: is missing",
        "judge.retries: is missing",
        faults=12,
    ),
    option(
        "time that YAML reads as a number",
        "resources/mine.yaml",
        "defaults: [default, _self_]\ntime: 1:30:00\n",
        "resources.time: 5400 is a number",
        "in quotes",
    ),
]
