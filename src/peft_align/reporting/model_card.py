"""A model card in the hub's form: what an adapter was made of and how, its scores, its licences, how it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import safe_dump

from peft_align.reporting.cell_scores import CellScore
from peft_align.reporting.exported import Exported
from peft_align.reporting.table import aligned, for_markdown
from peft_align.reporting.usage_snippet import snippet

NOT_RECORDED, ON_THE_HUB = "not recorded", "not recorded: see the hub page"
METHODS = {"sft": "supervised fine-tuning (SFT)", "dpo": "direct preference optimization (DPO)"}
TRAINED_WITH = (
    *("batch_size", "max_steps", "learning_rate", "schedule", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optimizer", "adam_betas", "max_length", "engine"),
)
ADAPTER = ("r", "alpha", "dropout", "target_modules", "adapter_dtype", "base_precision", "compute_dtype")
ARROWS = {True: " ↑", False: " ↓", None: ""}


@dataclass(frozen=True)
class Licences:
    """As the hub writes them; None where nobody said.

    Attributes:
        own: of the adapter, where the user says so.
        base: of the base model.
        data: of each data set, by its name.
    """

    own: str | None
    base: str | None
    data: Mapping[str, str | None]

    def front_matter(self) -> dict[str, str]:
        """What is said of the adapter: what the user says; else what base and data agree on, if all of them are known.

        Where they differ, which terms hold for an adapter is not for a program to say.
        """
        known = {self.base, *self.data.values()}
        if self.own is not None:
            return {"license": self.own}
        if None in known:
            return {}
        if len(known) == 1:
            return {"license": str(self.base)}
        return {"license": "other", "license_name": "those-of-base-and-data"}


@dataclass(frozen=True)
class Trained:
    """What one training was made of: of the exported run itself, or of an input of a merge.

    Attributes:
        run_id: its run.
        config: its settings, as run.json has them.
        axes: names of its options.
        record: train.json; empty where it is not there any more.
    """

    run_id: str
    config: Mapping[str, Any]
    axes: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def data(self) -> str:
        """The name of its data: the repository's, or the loader's."""
        data = self.config["dataset"]
        return _hub_name(data) or _folder_name(data.get("hub_id")) or str(data["loader"])

    @property
    def preference(self) -> str:
        return str(self.axes.get("preference") or self.config["preference"]["rule"])


def card(
    adapter: Exported, trained: Sequence[Trained], scores: Sequence[CellScore], licences: Licences, version: str
) -> str:
    """The whole of README.md.

    Args:
        adapter: what is exported.
        trained: its training, or those of a merge's inputs.
        scores: that are known.
        licences: of what it is made of.
        version: of this package.
    """
    base = adapter.config["model"]
    name = _hub_name(base) or _folder_name(adapter.base.get("name")) or "its base"
    blocks = [
        f"---\n{safe_dump(_front_matter(adapter, trained, licences), sort_keys=False, allow_unicode=True)}---",
        f"# {for_markdown(adapter.directory.id)}",
        _what_it_is(adapter, trained, str(name)),
        *("## Use", _template(base), f"```python\n{snippet(adapter)}```"),
        *("## Scores", _scores(adapter, scores)),
        *("## Data", _data(trained)),
        *("## Training" if adapter.kind == "train" else "## Merge", _method(adapter, trained)),
        *("## Licence", _licence(str(name), _hub_name(base) is not None, licences)),
        *("## Intended use and limits", _limits(trained)),
        *("## Provenance", _provenance(adapter, version)),
    ]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def _front_matter(adapter: Exported, trained: Sequence[Trained], licences: Licences) -> dict[str, Any]:
    base = _hub_name(adapter.config["model"])
    matter: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    matter |= {"library_name": "peft", "pipeline_tag": "text-generation"} | licences.front_matter()
    datasets = sorted({name for run in trained if (name := _hub_name(run.config["dataset"]))})
    matter |= {"datasets": datasets} if datasets else {}
    peft = {"qlora" if run.config["peft"]["base_precision"] == "nf4" else "lora" for run in trained}
    methods = {str(run.config["method"]["kind"]) for run in trained}
    preferences = {run.preference for run in trained}
    tags = ["peft_align", "preference-alignment", *sorted(peft), *sorted(methods), *sorted(preferences)]
    tags += ["merge"] if adapter.kind == "merge" else []
    tags += [f"base_model:adapter:{base}"] if base else []
    return matter | {"tags": tags}


def _what_it_is(adapter: Exported, trained: Sequence[Trained], base: str) -> str:
    aims = " and ".join(dict.fromkeys(f"*{for_markdown(run.preference)}*" for run in trained))
    data = " and ".join(dict.fromkeys(for_markdown(run.data) for run in trained))
    methods = " and ".join(dict.fromkeys(str(run.config["method"]["kind"]).upper() for run in trained))
    if adapter.kind == "merge":
        merge = for_markdown(str((adapter.identity.get("axes") or {}).get("merge") or adapter.config["merge"]["kind"]))
        what = f"A merge ({merge}) of {len(trained)} LoRA adapters for `{base}`, which were aligned to {aims}"
        error = adapter.record["saved"]["adapter"].get("relative_error")
        off = f" As one adapter it is off by {error:.2g} of the merged change, relatively." if error else ""
        return f"{what} by {methods} on {data}.{off} Made with peft_align."
    kind = "QLoRA" if adapter.config["peft"]["base_precision"] == "nf4" else "LoRA"
    seed = f"seed {adapter.config['seed']}, step {adapter.step}" + ("" if adapter.is_last else ", not the last one")
    return f"A {kind} adapter for `{base}`, aligned to {aims} by {methods} on {data} ({seed}). Made with peft_align."


def _template(model: Mapping[str, Any]) -> str:
    own = "the tokenizer's own chat template" if model["template"] == "chat" else f"`{model['template']}`"
    return f"Template: {own}, as in training. Under another one the adapter does not do what its scores say."


def _scores(adapter: Exported, scores: Sequence[CellScore]) -> str:
    if not scores:
        return "None are recorded."
    judged = any(one.judge for one in scores)
    head = ["benchmark", *(["judge"] if judged else []), "metric", "this adapter", "mean of its cell", "95% interval"]
    head += ["seeds", "n", "base"]
    body = []
    for one in scores:
        row = [one.benchmark, *([one.judge or ""] if judged else []), f"{one.metric}{ARROWS[one.higher_is_better]}"]
        row += [_number(one.value), _number(one.cell.mean), _interval(one), str(one.cell.seeds), str(one.n)]
        body.append([*row, _number(one.baseline)])
    text = "A cell is the runs that differ in the seed alone; its interval is Student's t over their scores, about "
    text += "training again. With one seed it is over the benchmark's items (`items`) and says nothing about training "
    text += "again. `n`: items; `base`: the unaligned base under the same conditions."
    if adapter.kind == "merge":
        text += " The scores are those of the merged weights, which the adapter stands for."
    return f"{aligned(head, body)}\n{text}"


def _interval(one: CellScore) -> str:
    over = " (items)" if one.cell.basis == "items" else ""
    if over and one.bound is not None:  # every item alike: their spread says nothing
        low, high = sorted((one.value, one.bound))
        return f"{_number(low)} to {_number(high)}{over}"
    return "" if one.cell.low is None else f"{_number(one.cell.low)} to {_number(one.cell.high)}{over}"


def _data(trained: Sequence[Trained]) -> str:
    head = ["what", *("is" if len(trained) == 1 else f"input {i + 1}" for i in range(len(trained)))]
    lines: dict[str, list[str]] = {}
    for run in trained:
        source = (run.record.get("inputs") or {}).get("data") or {}
        counts = (run.record.get("data") or {}).get("counts") or {}
        shown = {
            "run": run.run_id if len(trained) > 1 else None,
            "data set": run.data,
            "preference": run.preference,
            "revision": source.get("commit") or run.config["dataset"].get("revision") or _unpinned(run),
            "digest of its files": source.get("digest", "not recorded"),
            "pairs for training": counts.get("for_training", "not recorded"),
            "samples trained on": run.record.get("samples", "not recorded"),
            "different pairs among them": counts.get("used", "not recorded"),
        }
        for name, value in shown.items():
            if value is not None:
                lines.setdefault(name, []).append(str(value))
    return aligned(head, [[name, *values] for name, values in lines.items()])


def _unpinned(run: Trained) -> str:
    version = (run.record.get("provenance") or {}).get("peft_align", "")
    return "unpinned" if run.config["dataset"].get("hub_id") else f"carried by peft_align {version}".strip()


def _method(adapter: Exported, trained: Sequence[Trained]) -> str:
    if adapter.kind == "merge":
        merge = {k: v for k, v in adapter.config["merge"].items() if not k.startswith("save")}
        rows = [*merge.items(), ("rank of the adapter", adapter.record["saved"]["adapter"].get("rank"))]
        rows += [("seed", adapter.config.get("seed"))]
        rows += [(f"input {i + 1}", run.run_id) for i, run in enumerate(trained)]
        return aligned(["setting", "value"], [[str(k), _value(v)] for k, v in rows])
    config = adapter.config
    method, peft, train = config["method"], config["peft"], config["train"]
    own = {k: v for k, v in method.items() if k not in ("kind", "adapter", "optimization")}
    rows = [("method", METHODS.get(method["kind"], method["kind"])), *own.items()]
    rows += [(name, peft[name]) for name in ADAPTER if name in peft]
    rows += [(name, train[name]) for name in TRAINED_WITH if name in train]
    rows += [("seed", config["seed"]), ("trainable parameters", adapter.record.get("trainable_parameters"))]
    rows += [("started from", parent) for parent in adapter.identity.get("parents", ())]
    return aligned(["setting", "value"], [[str(k), _value(v)] for k, v in rows if v is not None])


def _licence(base: str, is_on_hub: bool, licences: Licences) -> str:
    rows = [["base model", base, licences.base or (ON_THE_HUB if is_on_hub else NOT_RECORDED)]]
    rows += [["data", name, licence or ON_THE_HUB] for name, licence in licences.data.items()]
    own = f"This adapter: {licences.own}. " if licences.own else ""
    own += "It is made of both: their terms go on to hold."
    return f"{aligned(['of', 'name', 'licence'], rows)}\n{own}"


def _limits(trained: Sequence[Trained]) -> str:
    aims = " and ".join(dict.fromkeys(for_markdown(run.preference) for run in trained))
    return (
        f"Made for research into what aligning a model to a preference ({aims}) changes and costs, to be compared with "
        "its base and with other adapters of its study. It is not made to be put before people: what it was not scored "
        "on above is not known, it can answer wrongly and harmfully, and it takes over the faults of its base and data."
    )


def _provenance(adapter: Exported, version: str) -> str:
    made = adapter.record.get("provenance") or {}
    git, hardware = made.get("git") or {}, made.get("hardware") or {}
    packages = ", ".join(f"{name} {v}" for name, v in (made.get("packages") or {}).items())
    commit = git.get("commit")
    rows = [
        ("run", adapter.directory.id),
        ("finished", adapter.record.get("finished")),
        ("digest of the adapter", adapter.digest if adapter.kind == "train" else None),
        ("digest of the merge's recipe", adapter.digest if adapter.kind == "merge" else None),
        *((f"sha256 of {name}", entry["sha256"]) for name, entry in adapter.files.items()),
        ("digest of the base", adapter.base.get("digest")),
        ("revision of the base", adapter.base.get("commit") or adapter.config["model"].get("revision")),
        *((f"sha256 of the base's {name}", digest) for name, digest in adapter.tokenizer.items()),
        ("trained with peft_align", made.get("peft_align")),
        ("its code", made.get("code")),
        ("its commit", commit and f"{commit}{' (changed)' if git.get('dirty') else ''}"),
        ("python", made.get("python")),
        ("packages", packages or None),
        ("device", hardware.get("gpu") or hardware.get("cpu")),
        ("exported with peft_align", version),
    ]
    return aligned(["what", "is"], [[name, str(value)] for name, value in rows if value is not None])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def _hub_name(node: Mapping[str, Any]) -> str | None:
    """The repository on the hub of a model or a data set; None for what is not there."""
    name = node.get("hub_id")
    is_there = (
        node.get("source", "hub") == "hub" and name is not None and not Path(str(name)).expanduser().is_absolute()
    )
    return str(name) if is_there else None


def _folder_name(name: Any) -> str | None:
    """Of a folder of this machine, its own name alone."""
    return None if name is None else Path(str(name)).name
