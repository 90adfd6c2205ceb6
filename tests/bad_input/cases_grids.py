"""Grid files of the user's own: broken YAML, unknown keys, wrong types, what matches nothing, merges without inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bad_input import Case, write

SEEDS = "axes: {seed: [0, 1]}"
SET = "set: {model: tiny, dataset: everyday}"


def grid(
    name: str,
    text: str | bytes,
    *told: str,
    words: Sequence[str] = (),
    others: dict[str, str] | None = None,
    faults: int = 1,
    unsaid: tuple[str, ...] = (),
) -> Case:
    """A grid file `mine` that is planned."""

    def prepare(folder: Path) -> list[str]:
        for option, content in ({"mine": text} | (others or {})).items():
            write(folder / f"conf/grid/{option}.yaml", content)
        return ["plan", "--config-dir", "conf", "+grid=mine", *words]

    return Case("grid", name, prepare, told, faults=faults, unsaid=unsaid)


def block(body: str, name: str = "mine") -> str:
    """A grid of one block."""
    return f"name: {name}\nblocks:\n  - {{name: one, {body}}}\n"


FILES = [
    grid("empty file", "", "grid/mine.yaml: has neither blocks nor include", "e.g."),
    grid("only comments", "# nothing\n", "grid/mine.yaml: has neither blocks nor include"),
    grid("bracket that is not closed", "blocks: [{axes: {seed: [0, 1}}]", "mine.yaml: line 1, column", "is not YAML"),
    grid("tab for blanks", "blocks:\n\t- axes: {seed: [0]}\n", "mine.yaml: line 2, column 1", "is not YAML"),
    grid("colon in plain text", "name: a: b\n", "mine.yaml: line 1, column 8", "is not YAML", "in quotes"),
    grid("key given twice", f"name: a\nname: b\nblocks: [{{{SEEDS}}}]\n", "mine.yaml: line 2", "duplicate key name"),
    grid("anchor that is not there", "blocks: *others\n", "mine.yaml: line 1", "undefined alias"),
    grid("a list at the top", "- name: mine\n", "mine.yaml: a mapping is expected at the top"),
    grid("a text at the top", "just text\n", "grid/mine.yaml: just text: no such key", "blocks", faults=2),
    grid("latin-1", "name: mine\n# f\xfcr\n".encode("latin-1"), "mine.yaml: is not UTF-8", "save it as UTF-8"),
    grid("binary", bytes(range(256)), "mine.yaml: is not"),
    grid("a Python object", "blocks: !!python/object/apply:os.system [echo]\n", "mine.yaml: line 1", "is not YAML"),
    grid("several documents", f"{block(SEEDS)}---\n{block(SEEDS)}", "mine.yaml: line", "is not YAML"),
    grid("nested a thousand deep", "blocks: " + "[" * 1000 + "]" * 1000, "mine.yaml: cannot be read", "nested"),
]
KEYS = [
    grid(
        "unknown key of a grid",
        f"{block(SEEDS)}baseline: true\n",
        "grid/mine.yaml: baseline: no such key",
        "'baselines'?",
    ),
    grid("unknown key of a block", block(f"{SEEDS}, sets: {{}}"), "blocks[0]: sets: no such key", "'set'?"),
    grid("unknown kind of block", block(f"kind: trian, {SEEDS}"), "blocks[0].kind: 'trian'", "'train'?"),
    grid("misspelled axis", block("axes: {methd: [sft]}"), "blocks[0].axes.methd: no such key", "'method'?"),
    grid("misspelled value", block("axes: {model: [tinny]}"), "blocks[0].axes.model", "'tiny'?"),
    grid(
        "misspelled setting", block(f"{SEEDS}, set: {{peft.rr: 8}}"), "blocks[0].set.peft.rr: no such key", "'peft.r'?"
    ),
    grid("number for a key", block("axes: {3: [4]}"), "blocks[0].axes.3: no such key", "allowed"),
    grid(
        "nested settings",
        block(f"{SEEDS}, set: {{peft: {{r: 8}}}}"),
        "blocks[0].set.peft",
        "write settings with dots: peft.r",
    ),
    grid(
        "group as an axis",
        block("axes: {hub: [a]}"),
        "blocks[0].axes.hub: holds for a sweep as a whole",
        "on the command line",
    ),
    grid(
        "unknown key of when",
        block(f"{SEEDS}, when: [{{where: {{seed: 0}}, axis: {{peft.r: [8]}}}}]"),
        "blocks[0].when[0]: axis: no such key",
        "'axes'?",
        faults=2,
    ),
    grid(
        "unknown key of exclude",
        block(f"{SEEDS}, exclude: [{{where: {{seed: 0}}, why: x, reason: x}}]"),
        "blocks[0].exclude[0]: why: no such key",
        "reason",
    ),
    grid(
        "setting of a sweep as a whole",
        block(f"{SEEDS}, set: {{root: elsewhere}}"),
        "blocks[0].set.root: holds for a sweep as a whole",
        "on the command line",
    ),
    grid("operational axis", block("axes: {train.micro_batch_size: [1, 2]}"), "is operational", "put it under set"),
    grid(
        "key as axis and set",
        block(f"{SEEDS}, set: {{seed: 3}}"),
        "blocks[0].seed: is given more than once",
        "keep one",
    ),
    grid(
        "key as axis and when",
        block(f"{SEEDS}, when: [{{where: {{method: sft}}, axes: {{seed: [1]}}}}]"),
        "blocks[0].when[0].seed: is an axis of the block already",
        "keep one",
    ),
]
TYPES = [
    grid(
        "null blocks",
        "name: mine\nblocks:\n",
        "grid/mine.yaml: blocks: a list of blocks is expected, not null",
        unsaid=("has neither",),
    ),
    grid(
        "blocks that are a mapping",
        f"blocks: {{one: {{{SEEDS}}}}}",
        "a list of blocks is expected, not {'one'",
        "e.g. blocks: [{",
    ),
    grid("a block that is null", "blocks:\n  -\n", "blocks[0]: a mapping is expected, not null"),
    grid("a block that is text", "blocks: [seed]\n", "blocks[0]: a mapping is expected, not 'seed'"),
    grid("null axes", block("axes: null"), "blocks[0].axes: a mapping is expected, not null"),
    grid("axes that are a list", block("axes: [seed]"), "blocks[0].axes: a mapping is expected", "{KEY: VALUE}"),
    grid("an axis that is one value", block("axes: {seed: 3}"), "blocks[0].axes.seed: a list of values", "write [3]"),
    grid("an axis without a value", block("axes: {seed: []}"), "blocks[0].axes.seed: a list of values is expected"),
    grid("a null value", block("axes: {seed: [null]}"), "blocks[0].axes.seed: the value is empty"),
    grid("a null option", block("axes: {model: [null]}"), "blocks[0].axes.model: the value is empty", "tiny"),
    grid("text for a number", block("axes: {peft.r: [eight]}"), "blocks[0].axes.peft.r: 'eight' is not a whole"),
    grid("out of range", block("axes: {peft.r: [0]}"), "blocks[0].axes.peft.r: 0 is out of range"),
    grid(
        "a mapping for a value", block(f"{SEEDS}, set: {{peft.r: {{a: 1}}}}"), "blocks[0].set.peft.r: {'a': 1} is not"
    ),
    grid(
        "zip that is a mapping",
        block(f"{SEEDS}, zip: {{peft.r: [8]}}"),
        "blocks[0].zip: a list is expected",
        "write zip: [...]",
    ),
    grid(
        "zip of unequal lengths",
        block("zip: [{peft.r: [8, 16], seed: [0]}]"),
        "blocks[0].zip[0]: keys that vary together need equally many values (peft.r: 2, seed: 1)",
    ),
    grid(
        "when that is a mapping", block(f"{SEEDS}, when: {{where: {{seed: 0}}}}"), "blocks[0].when: a list is expected"
    ),
    grid(
        "when without where",
        block(f"{SEEDS}, when: [{{axes: {{peft.r: [8]}}}}]"),
        "when[0].where: is missing",
        "where: {method: dpo}",
    ),
    grid("when without axes", block(f"{SEEDS}, when: [{{where: {{seed: 0}}}}]"), "when[0]: has neither axes nor set"),
    grid(
        "where of what the block does not have",
        block(f"{SEEDS}, when: [{{where: {{peft.r: 8}}, set: {{peft.alpha: 8}}}}]"),
        "when[0].where.peft.r: is neither an axis nor a setting of this block",
        "add it to axes",
    ),
    grid("name that is a list", "name: [a]\n" + block(SEEDS).partition("\n")[2], "grid/mine.yaml: name", "a text"),
    grid(
        "name of a block that is a mapping", "blocks: [{name: {a: 1}, axes: {seed: [0]}}]", "blocks[0].name", "a text"
    ),
    grid(
        "baselines that are text",
        f"{block(SEEDS)}baselines: 'no'\n",
        "baselines: true or false is expected",
    ),
    grid("include that is text", "include: main\n", "include: a list of grid names is expected", "[main]"),
    grid("include of numbers", "include: [1]\n", "include: a list of grid names is expected"),
    grid(
        "include of what is not there", "include: [mian]\n", "grid/mine.yaml: include: mian: no such option", "'main'?"
    ),
    grid("include of itself", "include: [mine]\n", "grid/mine.yaml: includes itself: mine -> mine"),
    grid(
        "include in a circle",
        "include: [other]\n",
        "includes itself: mine -> other -> mine",
        others={"other": "include: [mine]\n"},
    ),
    grid(
        "include of a faulty grid",
        "include: [other]\n",
        "grid/other.yaml: blocks[0].axes.sed",
        "'seed'?",
        others={"other": block("axes: {sed: [0]}")},
    ),
]
CELLS = [
    grid(
        "exclude that matches nothing",
        block(f"{SEEDS}, {SET}, exclude: [{{where: {{seed: 7}}, reason: x}}]"),
        "block one: exclude {'seed': [7]}: matches no cell of the block",
        "seed: 0, 1",
    ),
    grid(
        "exclude without a reason",
        block(f"{SEEDS}, exclude: [{{where: {{seed: 0}}}}]"),
        "blocks[0].exclude[0].reason: is missing",
        "say why",
    ),
    grid(
        "exclude of everything",
        block(f"{SEEDS}, {SET}, exclude: [{{where: {{dataset: everyday}}, reason: x}}]"),
        "grid: no run is left",
        "excluded: x",
    ),
    grid(
        "narrowed to nothing",
        block(f"{SEEDS}, {SET}"),
        "method.beta=.2",
        "it belongs to method dpo",
        words=["method.beta=.2"],
    ),
    grid(
        "narrowed by two axes to nothing",
        block("zip: [{seed: [0, 1], peft.r: [8, 16]}], " + SET),
        "seed=0 peft.r=16: no run is left",
        "peft.r: 8, 16",
        words=["seed=0", "peft.r=16"],
    ),
    grid(
        "too many cells",
        block(
            "axes: {seed: ["
            + ", ".join(map(str, range(1200)))
            + "], train.batch_size: ["
            + ", ".join(map(str, range(1, 1001)))
            + "]}, "
            + SET
        ),
        "1200000 cells are too many",
        "narrow an axis",
    ),
    grid(
        "DPO that continues another rank",
        block(
            "axes: {method: [sft, dpo]}, set: {model: tiny, dataset: everyday, "
            "method.init: sft}, when: [{where: {method: dpo}, axes: {peft.r: [8]}}]"
        ),
        "peft.r=8: 8 differs from the SFT run's 64",
        "set it for both",
    ),
    grid(
        "interpolation of what is not there",
        block(f"{SEEDS}, set: {{model: tiny, peft.r: '${{peft.rank}}'}}"),
        "peft.r=${peft.rank}: refers to a setting that does not exist",
    ),
]
MERGES = [
    grid(
        "merge without inputs",
        block("kind: merge, axes: {seed: [0], merge: [slerp]}"),
        "blocks[0].inputs: is missing",
        "[{preference: harmless}, {preference: helpful}]",
    ),
    grid(
        "merge that does not say how",
        block("kind: merge, inputs: [[{method: sft}, {method: dpo}]]"),
        "blocks[0].axes.merge: is missing",
        "merge: [slerp, dare_ties]",
    ),
    grid(
        "inputs of training",
        block(f"{SEEDS}, inputs: [[{{method: sft}}, {{method: dpo}}]]"),
        "blocks[0].inputs: belongs to a block of merges",
        "add kind: merge",
    ),
    grid("merge axis of training", block("axes: {merge: [slerp]}"), "blocks[0].merge: belongs to a block of merges"),
    grid(
        "one input",
        block("kind: merge, axes: {merge: [slerp]}, inputs: [[{method: sft}]]"),
        "blocks[0].inputs[0]: a list of two or more selectors is expected",
    ),
    grid(
        "inputs that are no list",
        block("kind: merge, axes: {merge: [slerp]}, inputs: [{method: sft}]"),
        "blocks[0].inputs[0]: a list of two or more selectors is expected",
        faults=1,
    ),
    grid(
        "an input twice",
        block("kind: merge, axes: {merge: [slerp]}, inputs: [[{method: sft}, {method: sft}]]"),
        "blocks[0].inputs[0]: names one input twice",
    ),
    grid(
        "an input by an axis of the block",
        block("kind: merge, axes: {merge: [slerp], seed: [0]}, inputs: [[{seed: 0}, {seed: 1}]]"),
        "blocks[0].inputs[0].seed: is an axis or a setting of the block already",
    ),
    grid(
        "three inputs of slerp",
        block(f"kind: merge, axes: {{merge: [slerp]}}, {SET}, inputs: [[{{seed: 0}}, {{seed: 1}}, {{seed: 2}}]]"),
        "block one: merge=slerp: slerp merges two inputs, not 3",
        "linear",
    ),
    grid(
        "inputs on different bases",
        block(
            "kind: merge, axes: {merge: [linear]}, set: {dataset: everyday}, "
            "inputs: [[{model: tiny}, {model: mistral_7b}]]"
        ),
        "trained on different bases",
    ),
    grid(
        "weights that do not fit",
        block(
            "kind: merge, axes: {merge: [linear]}, set: {model: tiny, "
            "dataset: everyday, merge.weights: [1, 2, 3]}, inputs: [[{seed: 0}, {seed: 1}]]"
        ),
        "merge.weights has 3 values for 2 inputs",
    ),
]

CASES = [*FILES, *KEYS, *TYPES, *CELLS, *MERGES]
