"""The typed schema of a run's configuration: YAML (conf/) holds the values, these dataclasses say what is allowed.

Each field states its meaning, its range, and whether it is *scientific* (part of the run id: another value is another
run) or *operational* (changes where, how fast or with what records a run is done, never its result).
A group whose options have different fields (a method, a launcher, a tracker) has one dataclass for each `kind`.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_align.config.fields import operational, value
from peft_align.config.judges import JUDGES, Classifier, Endpoint, LocalLM, NoJudge, Profanity
from peft_align.config.launchers import LAUNCHERS, Debug, Local, Resources, Slurm

LICENSE_FORM = (
    r"[a-z0-9][a-z0-9.+-]*",
    "is no licence as the hub writes them",
    "e.g. apache-2.0, mit, cc-by-nc-4.0, or other",
)


@dataclass(frozen=True)
class Dataset:
    loader: str = value("module of peft_align.data that reads it", choices=("hh_rlhf", "beavertails", "everyday"))
    hub_id: str | None = value("dataset repository on the hub; null when the package carries the data")
    revision: str | None = value("branch, tag or commit; null is unpinned")
    validation_fraction: float = value("share of the training prompts held back for validation", low=0.0, high=0.5)
    expected_rows: dict[str, int] | None = operational(
        "rule -> rows of the full train split before filters; another number is warned about", default=None, low=1
    )
    license: str | None = operational("as the hub writes it, for model cards; null: not said", None, form=LICENSE_FORM)


@dataclass(frozen=True)
class Preference:
    rule: str = value("rule of the dataset's loader that says which response is chosen")
    loaders: list[str] | None = operational("loaders that have the rule; null: all", default=None)


@dataclass(frozen=True)
class Adapter:
    r: int = operational("default rank of the method", low=1)
    alpha: float = operational("default LoRA alpha of the method", above=0)
    dropout: float = operational("default LoRA dropout of the method", low=0, high=0.95)
    target_modules: list[str] = operational("modules of the base that get an adapter by default")


@dataclass(frozen=True)
class Optimization:
    learning_rate: float = operational("default learning rate of the method", above=0)
    weight_decay: float = operational("default weight decay of the method", low=0)
    max_grad_norm: float = operational("default gradient clipping of the method", above=0)
    schedule: str = operational("default schedule of the method", choices=("constant", "linear", "cosine"))


@dataclass(frozen=True)
class SFT:
    kind: str = value("which training method", choices=("sft",))
    adapter: Adapter = operational("read by peft/")
    optimization: Optimization = operational("read by train/")


@dataclass(frozen=True)
class DPO:
    kind: str = value("which training method", choices=("dpo",))
    beta: float = value("strength of the pull towards the reference", above=0)
    init: str = value("fresh adapter, or the SFT run of the same cell", choices=("base", "sft"))
    adapter: Adapter = operational("read by peft/")
    optimization: Optimization = operational("read by train/")


@dataclass(frozen=True)
class Shape:
    layers: int = operational("decoder layers", low=1)
    hidden: int = operational("hidden size", low=1)
    heads: int = operational("attention heads", low=1)
    kv_heads: int = operational("key-value heads", low=1)
    ffn: int = operational("width of the feed-forward layer", low=1)
    vocabulary: int = operational("tokens", low=1)
    tied: bool = operational("input and output embeddings are one matrix")


@dataclass(frozen=True)
class Model:
    source: str = value("where the weights come from", choices=("hub", "cache", "random"))
    hub_id: str | None = value("repository on the hub, or folder name in the cache")
    revision: str | None = value("branch, tag or commit; null is unpinned")
    template: str = value("how a dialogue becomes text", choices=("vicuna", "mistral", "chat"))
    shape: Shape = operational("for plan's figures without a download; weights are identified by digest")
    attention: str = operational("attention implementation", default="sdpa", choices=("sdpa", "eager"))
    instruction_tuned: bool | None = operational("for reports; null: not said", default=None)
    tuned_from: str | None = operational("option of the model that it was tuned from, for reports", default=None)
    license: str | None = operational("as the hub writes it, for model cards; null: not said", None, form=LICENSE_FORM)


@dataclass(frozen=True)
class Peft:
    base_precision: str = value("precision of the frozen base", choices=("bf16", "fp32", "nf4"))
    double_quantization: bool = value("quantize the quantization constants too (nf4)")
    compute_dtype: str = value("precision of the matrix products", choices=("bf16", "fp32"))
    adapter_dtype: str = value("precision of the adapter's weights", choices=("fp32", "bf16"))
    r: int = value("rank of the adapter", low=1)
    alpha: float = value("LoRA alpha; the adapter is scaled by alpha / r", above=0)
    dropout: float = value("LoRA dropout", low=0, high=0.95)
    target_modules: list[str] = value("modules of the base that get an adapter")


@dataclass(frozen=True)
class NoMerge:
    kind: str = value("no merge: a run of its own training", choices=("none",))


@dataclass(frozen=True)
class Merge:
    """What is kept of a merge besides its recipe."""

    save: str = operational("what is written besides the recipe", choices=("none", "adapter", "full"))
    save_rank: int | None = operational("rank of a saved adapter; null: the sum of the inputs'", low=1)
    save_tolerance: float = operational("largest relative error of a saved adapter", low=0, high=1)


@dataclass(frozen=True)
class Slerp(Merge):
    kind: str = value("which kind of merge", choices=("slerp",))
    space: str = value("merge the adapters' weight changes, or whole weights", choices=("delta", "weights"))
    t: float = value("0 is the first input, 1 the second", low=0, high=1)


@dataclass(frozen=True)
class Arithmetic(Merge):
    kind: str = value("which kind of merge", choices=("arithmetic",))
    space: str = value("merge the adapters' weight changes", choices=("delta",))
    weights: list[float] | None = value("one for each input; null: 1 / number of inputs")
    sparsify: str = value("which entries of a change are kept", choices=("none", "magnitude", "random"))
    density: float = value("share of the entries kept", above=0, high=1)
    rescale: bool = value("divide what is kept at random by the density")
    elect_sign: bool = value("drop entries against the sign of their weighted sum (TIES)")
    normalize: bool = value("divide by the sum of the weights that took part")
    scaling: float = value("lambda, the factor of the merged change")


OPTIMIZERS = ("adamw_torch", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit")


@dataclass(frozen=True)
class Train:
    engine: str = value("training engine", choices=("packed", "trl"))
    max_steps: int = value("optimizer steps", low=1)
    batch_size: int = value("samples per optimizer step", low=1)
    learning_rate: float = value("peak learning rate", above=0)
    weight_decay: float = value("decoupled weight decay", low=0)
    max_grad_norm: float = value("gradients are clipped to this norm", above=0)
    schedule: str = value("learning-rate schedule after warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = value("steps of linear warm-up", low=0)
    optimizer: str = value(
        "optimizer", choices=("adamw_torch", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
    )
    adam_betas: list[float] = value("Adam's two decay rates", low=0, high=0.99999, length=2)
    max_length: int = value("tokens of prompt and response together", low=8)
    checkpoint_steps: list[int] = operational("steps whose adapter is kept", low=1)
    micro_batch_size: int = operational("samples per forward pass (engine trl)", low=1)
    micro_batch_tokens: int | None = operational(
        "tokens per forward pass (engine packed); null: as memory allows", low=1
    )
    gradient_checkpointing: bool | None = operational(
        "recompute activations: less memory, more time; null: where memory demands it (engine packed)"
    )
    state_every: int = operational("steps after which the training state is saved, to go on from", low=1)
    keep_states: int = operational("training states kept; a damaged one is passed over", default=2, low=1)
    attention: str = operational(
        "how rows attend (engine packed); auto: the faster way on a GPU, on a CPU parts",
        default="auto",
        choices=("auto", "parts", "flex"),
    )
    pack_runs: int = operational(
        "runs of one base that a worker trains in one forward pass (engine packed)", default=1, low=1
    )


@dataclass(frozen=True)
class Evaluation:
    benchmarks: list[str] = operational("options of conf/benchmark/ or names of lm-eval tasks")
    steps: list[int] = operational("training steps whose adapter is evaluated", low=1)
    limit: int | None = operational("samples per task; null: all", low=1)
    heldout: int = operational("held-out pairs for `preference`", low=1)
    heldout_split: str = operational("which pairs are held out", choices=("test", "validation"))
    batch_size: int = operational("sequences per forward pass", low=1)
    max_new_tokens: int | None = operational(
        "longest text that any benchmark generates, for a quick look; null: each its own", default=None, low=1
    )
    batch_tokens: int = operational(
        "tokens per forward pass of multiple-choice benchmarks, in which texts share what they begin with",
        default=4096,
        low=1,
    )
    backend: str = operational(
        "what computes lm-eval's benchmarks: hf, or vllm, which was never run here",
        default="hf",
        choices=("hf", "vllm"),
    )
    include_path: str | None = operational("folder of your own lm-eval task YAML files", default=None)
    base_precision: str | None = operational(
        "precision of the base that is evaluated; null: that which was trained on",
        default=None,
        choices=("bf16", "fp32", "nf4"),
    )


@dataclass(frozen=True)
class NoTracker:
    kind: str = operational("which tracker", choices=("none",))


@dataclass(frozen=True)
class Wandb:
    kind: str = operational("which tracker", choices=("wandb",))
    project: str = operational("project name")
    entity: str | None = operational("team or user; null: your default")
    mode: str = operational("auto: online if a key and the network are there", choices=("auto", "online", "offline"))


@dataclass(frozen=True)
class Hub:
    mirror: str | None = operational("folder that is looked into before the hub")


@dataclass(frozen=True)
class Disk:
    keep_free_gb: float = operational("GB of the root's file system that a sweep leaves free", low=0)
    cache_gb: float = operational("GB of reference/ and tokenized/ under the root that `clean` leaves", low=0)
    check: bool = operational("start nothing whose adapters and merges plainly have no room")


@dataclass(frozen=True)
class Config:
    """All settings of one run, resolved and checked."""

    dataset: Dataset
    preference: Preference
    method: SFT | DPO
    model: Model
    peft: Peft
    merge: NoMerge | Slerp | Arithmetic
    train: Train
    evaluation: Evaluation
    judge: NoJudge | Endpoint | LocalLM | Classifier | Profanity
    launcher: Local | Debug | Slurm
    resources: Resources
    tracker: NoTracker | Wandb
    seed: int = value("seeds the adapter, the order of samples and dropout", low=0, high=2**31 - 1)
    root: str = operational("holds runs/ and sweeps/")
    hub: Hub = operational("where data and models come from")
    disk: Disk = operational("how much room results may take")


# Group -> its dataclass, or one for each `kind`. The order is that of slugs and tables.
GROUPS: dict[str, type | dict[str, type]] = {
    "dataset": Dataset,
    "preference": Preference,
    "method": {"sft": SFT, "dpo": DPO},
    "model": Model,
    "peft": Peft,
    "merge": {"none": NoMerge, "slerp": Slerp, "arithmetic": Arithmetic},
    "train": Train,
    "evaluation": Evaluation,
    "judge": JUDGES,
    "launcher": LAUNCHERS,
    "resources": Resources,
    "tracker": {"none": NoTracker, "wandb": Wandb},
}
# The groups that make a training run what it is, and those that make any run; the others are operational.
TRAINING_GROUPS = ("dataset", "preference", "method", "model", "peft", "train")
SCIENTIFIC_GROUPS = (*TRAINING_GROUPS, "merge")
# Values that belong to no group, and what may only be set for a sweep as a whole.
TOP_LEVEL = ("seed", "root", "hub", "disk")
SWEEP_LEVEL = ("launcher", "resources", "tracker", "root", "hub", "disk")
# The axes that make an experiment what it is; the report has a column for each.
MAIN_AXES = ("dataset", "preference", "method", "model", "peft")
