"""Merges as a stage on the tiny model: in memory, recorded, and saved as one adapter."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sweeping import expand, write_option
from transformers import AutoModelForCausalLM

from peft_align.config.compose import ConfigSpace
from peft_align.config.schema import Arithmetic, Slerp
from peft_align.grid.planner import Planner, adapter_digest
from peft_align.grid.runs import Run
from peft_align.models.loading import Base, BaseCache, load_base
from peft_align.models.merged import MergeRefused, merged_model, record_merge, save_merge
from peft_align.models.merging import coefficients, modules_of, read_adapter, sparsify
from peft_align.store.records import Damaged, Digests, digest_of, inventory, write_json
from peft_align.store.runs import FORMAT, RunDir

IDS = torch.arange(3, 40)[None]
TOLERANCE = 1e-5
# One merge of two adapters of different rank and scale; q_proj and v_proj have both, up_proj the first alone.
GRID = """
blocks:
  - kind: merge
    axes: {merge: [linear]}
    inputs: [[{method: sft}, {method: dpo}]]
    when:
      - {where: {method: sft}, set: {peft.r: 4, peft.alpha: 8, peft.target_modules: [q_proj, v_proj, up_proj]}}
      - {where: {method: dpo}, set: {peft.r: 6, peft.alpha: 2, peft.target_modules: [q_proj, v_proj, o_proj]}}
    set: {model: tiny, dataset: everyday, peft: lora, peft.compute_dtype: fp32, train.max_steps: 4}
baselines: false
"""
PRECISIONS = {
    "fp32": (),
    "bf16": ("peft.compute_dtype=bf16",),
    "nf4": ("peft=qlora", "peft.compute_dtype=bf16"),
}

Made = tuple[Run, RunDir]
Make = Callable[..., Made]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> ConfigSpace:
    folder = tmp_path_factory.mktemp("conf")
    write_option(folder, "grid/pair", GRID)
    return ConfigSpace([folder])


@pytest.fixture
def make(space: ConfigSpace, tmp_path: Path) -> Make:
    """The merge that the words ask for, its inputs on disk."""

    def made(*words: str, std: float = 0.1) -> Made:
        *inputs, run = expand("+grid=pair", *words, space=space).runs
        for i, parent in enumerate(inputs):
            leave_trained(RunDir(tmp_path, parent.id), parent, i, std)
        return run, RunDir(tmp_path, run.id)

    return made


def leave_trained(directory: RunDir, run: Run, seed: int, std: float) -> None:
    """A run's adapter with random weights, made by PEFT, and the record of its training."""
    if directory.train_record():
        return
    peft = run.config.peft
    torch.manual_seed(seed)
    shape = LoraConfig(task_type="CAUSAL_LM", r=peft.r, lora_alpha=peft.alpha, target_modules=peft.target_modules)
    disturbed(get_peft_model(plain_base(), shape), std).save_pretrained(str(directory.adapter))
    files = inventory(directory.adapter, [path.name for path in directory.adapter.iterdir()], Digests())
    saved = {"files": files, "digest": digest_of(files)}
    record = {"format": FORMAT, "run": run.id, "checkpoints": {"4": saved}, "metrics": {}, "parents": {}, "inputs": {}}
    write_json(directory.path / "train.json", record)


def disturbed(model: Any, std: float = 0.1) -> Any:
    """A model whose fresh adapter changes it."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def plain_base() -> Any:
    """The tiny model by plain transformers, in fp32."""
    return AutoModelForCausalLM.from_pretrained(load("fp32").folder, dtype=torch.float32)


@functools.cache
def load(precision: str) -> Base:
    """The tiny model at a precision, in plain weights."""
    config = expand("model=tiny", "peft=lora", "peft.compute_dtype=fp32").runs[0].config
    if precision != "fp32":
        config = expand("model=tiny", "peft=lora" if precision == "bf16" else "peft=qlora").runs[0].config
    return load_base(config, dequantized=True)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def merged_weights(made: Made, precision: str = "fp32") -> dict[str, torch.Tensor]:
    with merged_model(*made, load(precision)) as model:
        return weights_of(model)


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert set(ours) == set(theirs)
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


# --- in memory


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_base_is_given_back_bit_for_bit(make: Make, precision: str) -> None:
    made, base = make(*PRECISIONS[precision], "merge=dare_ties"), load(precision)
    before = weights_of(base.model)
    changed = {"self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"}
    expected = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in changed}
    with merged_model(*made, base) as model:
        assert model is base.model
        assert {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])} == expected
    assert all(torch.equal(value, before[name]) for name, value in weights_of(base.model).items())
    with pytest.raises(KeyError), merged_model(*made, base):
        raise KeyError("what an evaluation may come to")
    assert all(torch.equal(value, before[name]) for name, value in weights_of(base.model).items())


def test_a_merge_is_the_same_every_time_and_another_for_another_seed(make: Make) -> None:
    first, again = (merged_weights(make("merge=dare_linear")) for _ in range(2))
    assert furthest(first, again) == 0
    run, directory = make("merge=dare_linear")
    other = replace(run, config=replace(run.config, seed=1))  # the same inputs
    assert furthest(first, merged_weights((other, directory))) > 0.01


def test_a_dequantized_base_is_what_bitsandbytes_computes_with() -> None:
    (run, *_) = expand("model=tiny", "dataset=everyday", "peft=qlora").runs
    quantized, plain = BaseCache().get(run.config), load("nf4")
    linear = [name for name, module in quantized.model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(linear) == 2 * 7
    for name in linear:
        weight, ours = quantized.model.get_submodule(name).weight, plain.model.get_submodule(name).weight
        theirs = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.to(torch.bfloat16))
    with torch.inference_mode():
        models = (quantized.model, plain.model, plain_base())
        theirs, ours, exact = (model(input_ids=IDS).logits.float() for model in models)
    assert float((ours - theirs).abs().max()) < 0.1 * float((exact - theirs).abs().max())


def test_a_cache_tells_a_dequantized_base_from_a_quantized_one() -> None:
    cache, config = BaseCache(), expand("model=tiny", "peft=qlora").runs[0].config
    assert not cache.get(config).dequantized
    assert cache.get(config, dequantized=True).dequantized
    assert cache.loads == 2


def test_a_damaged_input_is_not_merged(make: Make) -> None:
    run, directory = make()
    before = weights_of(load("fp32").model)
    path = RunDir(directory.root, run.parents[1]).adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Damaged, match="is damaged"), merged_model(run, directory, load("fp32")):
        pass
    assert furthest(weights_of(load("fp32").model), before) == 0
    with pytest.raises(Damaged, match="is damaged"):
        save_merge(run, directory, load("fp32"), "adapter")
    assert not directory.merged("adapter").exists()


# --- saved


def saved(run: Run, directory: RunDir, precision: str = "fp32") -> dict[str, Any]:
    """Record a merge and save it in the one form that it asks for; what the record says of that."""
    record_merge(run, directory)
    (form,) = run.saves
    return save_merge(run, directory, load(precision), form)


ADAPTERS = {
    "linear": (),
    "linear weighted": ("merge.weights=[0.5,1.5]", "merge.scaling=0.7"),
    "task_arithmetic": ("merge.weights=[0.5,-1.5]", "merge.scaling=0.7"),
    "slerp": ("merge.space=delta", "merge.t=0.3"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_linear_combination_saved_as_an_adapter_is_the_merge(make: Make, case: str) -> None:
    run, directory = made = make(f"merge={case.split()[0]}", *ADAPTERS[case], "merge.save=adapter")
    own = saved(run, directory)
    assert (own["rank"], own["relative_error"]) == (4 + 6, 0.0)
    assert sorted(own["files"]) == ["adapter_config.json", "adapter_model.safetensors"]
    plain = plain_base()
    before = weights_of(plain)
    loaded = weights_of(PeftModel.from_pretrained(plain, directory.merged("adapter")).merge_and_unload())
    ours = merged_weights(made)
    assert furthest(loaded, ours) < TOLERANCE
    assert furthest(loaded, before) > 1000 * TOLERANCE


def test_slerp_of_whole_weights_is_linear_where_they_are_nearly_parallel_and_only_there() -> None:
    how = expand("+grid=merge", "merge=slerp", "merge.t=0.3").by_id()
    (merged, *_) = [run.config.merge for run in how.values() if run.kind == "merge"]
    assert isinstance(merged, Slerp)
    base, changes = torch.randn(8, 8), [torch.randn(8, 8), torch.randn(8, 8)]
    assert coefficients(merged, base, [0.01 * change for change in changes]) == [0.7, 0.3]
    assert coefficients(merged, base, [10 * change for change in changes]) is None


def test_an_arc_between_nearly_parallel_weights_is_a_line_and_so_an_adapter(make: Make) -> None:
    run, directory = made = make("merge=slerp", "merge.space=weights", "merge.t=0.3", "merge.save=adapter", std=0.002)
    own = saved(run, directory)
    assert (own["rank"], own["relative_error"]) == (4 + 6, 0.0)
    loaded = weights_of(PeftModel.from_pretrained(plain_base(), directory.merged("adapter")).merge_and_unload())
    assert furthest(loaded, merged_weights(made)) < TOLERANCE
    assert furthest(loaded, weights_of(plain_base())) > 100 * TOLERANCE


def test_an_arc_between_other_weights_is_refused(make: Make) -> None:
    with pytest.raises(MergeRefused):
        saved(*make("merge=slerp", "merge.space=weights", "merge.save=adapter", std=0.5))


def test_a_linear_merge_is_pefts_own_of_the_same_adapters(make: Make) -> None:
    run, directory = make("merge.save=adapter")
    saved(run, directory)
    first, second = (RunDir(directory.root, parent).adapter for parent in run.parents)
    model = PeftModel.from_pretrained(plain_base(), first, adapter_name="first")
    model.load_adapter(second, "second")
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both", combination_type="cat")
    theirs = {
        name.removeprefix("base_model.model."): module.get_delta_weight("both")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "both" in module.lora_A
    }
    ours = {name: factors.delta() for name, factors in read_adapter(directory.merged("adapter")).items()}
    assert len(ours) == 2 * 4
    assert furthest(ours, theirs) < TOLERANCE


SPARSE = ("merge=dare_linear", "merge.density=0.5", "merge.save=adapter", "merge.save_rank=3")


def test_a_merge_that_is_no_adapter_is_refused_with_the_error(make: Make) -> None:
    run, directory = make(*SPARSE)
    with pytest.raises(MergeRefused, match=r"an adapter of rank 3 is off by 0\.\d+ or more of the merged change"):
        saved(run, directory)
    assert (directory.merge_record() or {})["saved"] == {}
    assert not directory.merged("adapter").exists()


def test_a_refused_adapter_leaves_what_was_saved_before(make: Make) -> None:
    run, directory = make("merge=dare_linear", "merge.density=0.5", "merge.save=full")
    saved(run, directory)
    record = directory.merge_record()
    wish, _ = make(*SPARSE)
    with pytest.raises(MergeRefused):
        save_merge(wish, directory, load("fp32"), "adapter")
    assert directory.merge_record() == record
    assert Planner(directory.root, None).item(run).to_save == ()
    assert Planner(directory.root, None).item(wish).to_save == ("adapter",)


def test_with_the_tolerance_for_it_its_error_is_recorded(make: Make) -> None:
    run, directory = made = make(*SPARSE, "merge.save_tolerance=1")
    details = saved(run, directory)
    before = weights_of(plain_base())
    changes = {name: value - before[name] for name, value in merged_weights(made).items()}
    factors = read_adapter(directory.merged("adapter"))
    assert {len(each.a) for each in factors.values()} == {3} == {details["rank"]}
    wrong = [float((changes[f"{name}.weight"] - f.delta()).square().sum()) for name, f in factors.items()]
    whole = sum(float(change.square().sum()) for change in changes.values())
    tails = [float(torch.linalg.svdvals(changes[f"{name}.weight"].double())[3:].square().sum()) for name in factors]
    assert details["relative_error"] == pytest.approx((sum(wrong) / whole) ** 0.5, rel=1e-4)
    assert details["relative_error"] == pytest.approx((sum(tails) / whole) ** 0.5, rel=1e-4)  # the best there is
    assert details["relative_error"] > 0.1


def test_the_tolerance_is_for_the_adapter_as_a_whole(make: Make) -> None:
    run, directory = make(*SPARSE, "merge.save_tolerance=1")
    error = saved(run, directory)["relative_error"]
    above, below = (make(*SPARSE, f"merge.save_tolerance={error * factor}")[0] for factor in (1.001, 0.999))
    assert saved(above, directory)["relative_error"] == error
    with pytest.raises(MergeRefused):
        saved(below, directory)


def test_enough_rank_for_every_module_loses_nothing(make: Make) -> None:
    run, directory = made = make(*SPARSE[:-1], "merge.save_rank=64")  # more than the modules' 32
    details = saved(run, directory)
    assert details["rank"] == 64
    assert details["relative_error"] < TOLERANCE
    loaded = weights_of(PeftModel.from_pretrained(plain_base(), directory.merged("adapter")).merge_and_unload())
    assert furthest(loaded, merged_weights(made)) < TOLERANCE


def test_a_whole_model_on_a_dequantized_base_is_saved_as_plain_weights(make: Make) -> None:
    run, directory = made = make(*PRECISIONS["nf4"], "merge.save=full")
    saved(run, directory, "nf4")
    assert "quantization_config" not in json.loads((directory.merged("full") / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(directory.merged("full"), dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert furthest(weights_of(loaded), merged_weights(made, "nf4")) == 0


def test_the_record_tells_the_recipe(make: Make) -> None:
    run, directory = make("merge=dare_ties", "merge.density=0.25")
    record = record_merge(run, directory)
    parents = {name: adapter_digest(RunDir(directory.root, name).train_record()) for name in run.parents}
    assert record == directory.merge_record()
    assert (record["parents"], record["adapters"]) == (parents, list(parents.values()))
    assert (record["merge"]["density"], record["merge"]["elect_sign"], record["seed"]) == (0.25, True, 0)
    assert "save" not in record["merge"]
    assert (record["weights"], record["saved"]) == ("fp32", {})
    assert Planner(directory.root, None).item(run).to_make is None


def test_the_digest_is_that_of_the_recipe_alone(make: Make) -> None:
    words = [(), ("merge.save=adapter",), ("merge.scaling=2",), ("merge=ties",), ("seed=1",)]
    found = []
    for each in words:
        run, directory = make(*each)
        found.append(record_merge(run, directory)["digest"])
    assert found[0] == found[1]
    assert len(set(found)) == len(words) - 1


def test_an_adapter_of_another_rank_than_the_saved_one_is_to_be_made(make: Make) -> None:
    run, directory = make("merge.save=adapter")
    saved(run, directory)
    smaller, _ = make("merge.save=adapter", "merge.save_rank=2", "merge.save_tolerance=1")
    assert Planner(directory.root, None).item(run).to_save == ()
    assert Planner(directory.root, None).item(smaller).to_save == ("adapter",)


def test_what_was_saved_on_another_base_is_to_be_saved_again(make: Make) -> None:
    run, directory = make("merge.save=adapter")
    saved(run, directory)
    record = directory.merge_record() or {}
    record["saved"]["adapter"]["inputs"]["model"]["digest"] = "of other weights"
    write_json(directory.path / "merge.json", record)
    assert Planner(directory.root, None).item(run).to_save == ("adapter",)


# --- random masks


@pytest.fixture
def dare(make: Make) -> Arithmetic:
    how = make("merge=dare_linear", "merge.density=0.3")[0].config.merge
    assert isinstance(how, Arithmetic)
    return how


def test_dare_keeps_the_share_asked_for_and_rescales_it(dare: Arithmetic) -> None:
    change = torch.randn(256, 400)
    kept = sparsify(dare, change, "q_proj", 0, seed=0)
    mask = kept != 0
    assert float(mask.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.allclose(kept, change * mask / 0.3)
    plain = sparsify(replace(dare, rescale=False), change, "q_proj", 0, seed=0)
    assert torch.equal(plain, change * mask)
    assert torch.equal(sparsify(replace(dare, density=1.0), change, "q_proj", 0, seed=0), change)


def test_a_mask_depends_on_seed_module_and_input_and_on_nothing_else(dare: Arithmetic) -> None:
    def mask(module: str = "q_proj", index: int = 0, seed: int = 0) -> torch.Tensor:
        return sparsify(dare, torch.ones(64, 64), module, index, seed) != 0

    first = mask()
    torch.manual_seed(9)
    others = [mask("v_proj"), mask(index=1), mask(seed=1)]
    assert torch.equal(mask(), first)
    for other in others:
        # independent masks agree at 0.3² + 0.7² of the places
        assert float((other == first).float().mean()) == pytest.approx(0.58, abs=0.05)


def test_drawing_a_mask_leaves_torchs_own_random_numbers_alone(dare: Arithmetic) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sparsify(dare, torch.ones(64, 64), "q_proj", 0, 0)
    assert torch.equal(torch.rand(3), expected)


def test_a_module_is_merged_alike_with_other_modules_and_without(make: Make) -> None:
    run, directory = made = make("merge=dare_linear")
    whole = merged_weights(made)
    for parent in run.parents:  # the same adapters without up_proj, which was merged between the others
        cut(RunDir(directory.root, parent), "up_proj")
    less = merged_weights(made)
    differ = {name for name, value in whole.items() if not torch.equal(value, less[name])}
    assert differ == {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}


def cut(directory: RunDir, module: str) -> None:
    """Take a module out of a saved adapter."""
    path = directory.adapter / "adapter_model.safetensors"
    save_file({name: v for name, v in load_file(path).items() if module not in name}, path)
    record = directory.train_record() or {}
    record["checkpoints"]["4"]["files"] = inventory(directory.adapter, [path.name], Digests())
    write_json(directory.path / "train.json", record)


# --- reading adapters


def saved_by_peft(folder: Path, **more: Any) -> Path:
    config = LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | more))
    disturbed(get_peft_model(plain_base(), config)).save_pretrained(str(folder))
    return folder


def test_a_plain_adapter_is_read_as_the_change_it_makes(tmp_path: Path) -> None:
    factors = read_adapter(saved_by_peft(tmp_path))
    before, plain = weights_of(plain_base()), plain_base()
    after = weights_of(PeftModel.from_pretrained(plain, tmp_path).merge_and_unload())
    assert modules_of([factors]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    for name, each in factors.items():
        assert torch.allclose(after[f"{name}.weight"] - before[f"{name}.weight"], each.delta(), atol=1e-6)


SPECIAL: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("word", SPECIAL)
def test_an_adapter_that_is_no_plain_lora_is_refused_by_name(tmp_path: Path, word: str) -> None:
    folder = saved_by_peft(tmp_path, **SPECIAL[word])
    with pytest.raises(ValueError, match=rf"is no plain LoRA adapter \({word}\)"):
        read_adapter(folder)


def test_an_adapter_of_which_a_part_would_be_left_out_is_refused(tmp_path: Path) -> None:
    folder = saved_by_peft(tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="adapter"):
        read_adapter(folder)
