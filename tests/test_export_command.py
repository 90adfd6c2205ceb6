"""`export`: an adapter and a card that says what it is, from the records alone."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeping import expand, finish_evaluation, finish_training, metric, plan, trained, write_option

from peft_align import export
from peft_align.config.compose import ConfigSpace
from peft_align.errors import InputError
from peft_align.grid.planner import adapter_digest
from peft_align.grid.runs import Run, Sweep
from peft_align.grid.serialize import write_identity
from peft_align.reporting.table import columns, rows
from peft_align.store.records import write_json
from peft_align.store.runs import FORMAT, RunDir

Verb = Callable[..., "subprocess.CompletedProcess[str]"]
WORDS = (
    *("model=mistral_7b", "dataset=beavertails", "preference=helpful", "method=dpo", "peft=qlora"),
    *("train.max_steps=4", "train.checkpoint_steps=[2,4]", "evaluation.benchmarks=[everyday_mc,preference]"),
)
SOURCES: dict[str, Any] = {
    "data": {"name": "PKU-Alignment/PKU-SafeRLHF", "commit": "c0ffee", "files": {}, "digest": "d1" * 32},
    "model": {
        "name": "mistralai/Mistral-7B-v0.1",
        "commit": "beef01",
        "files": {"tokenizer.json": {"size": 3, "sha256": "a1" * 32}, "model.safetensors": {"size": 1, "sha256": "b"}},
        "digest": "e2" * 32,
    },
}
MADE = {
    "samples": 64,
    "data": {"counts": {"for_training": 297, "used": 60}, "warning": None},
    "trainable_parameters": 1234,
    "provenance": {
        "peft_align": "0.0.9",
        "packages": {"torch": "2.9"},
        "hardware": {"host": "secret-host", "gpu": "H1"},
    },
}


def done(root: Path, *words: str, scores: Mapping[int, float] | None = None) -> Sweep:
    """A sweep of the study's kind that is done; scores by seed, of the base at -1."""
    given = {word.partition("=")[0]: word for word in (*WORDS, *words)}
    sweep = expand(*given.values(), f"root={root}")
    for run in sweep.runs:
        directory = RunDir(root, run.id)
        if run.kind == "train":
            finish_training(root, run, inputs=SOURCES, **MADE)
        write_identity(run, directory)
    for item in plan(sweep, root):
        for request in item.requests:
            value = (scores or {}).get(item.run.config.seed if item.run.kind == "train" else -1, 0.5)
            named = [metric("acc" if request.benchmark == "everyday_mc" else "accuracy", value)]
            finish_evaluation(root, request, named)
    return sweep


def exports(root: Path, run: str, *words: str) -> Path:
    """Export a run, which must succeed; returns the folder."""
    target = root.parent / "exported"
    assert export.verb([run, f"root={root}", "--to", str(target), *words]) == 0
    return target


def faults(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        export.verb(list(words))
    return caught.value.render()


def front_matter(folder: Path) -> dict[str, Any]:
    _, text, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def row(folder: Path, *begins: str) -> list[str]:
    """The only row of the card's tables that begins with these cells."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (found,) = (cells for cells in tables if cells[: len(begins)] == list(begins))
    return found


def test_the_card_says_what_the_adapter_is_made_of(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    sweep = done(root, "seed=0")
    (run,) = trained(sweep)
    folder = exports(root, run.id)
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "README.md", "peft_align.json")
    }
    directory = RunDir(root, run.id)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / name).read_bytes() == (directory.adapter / name).read_bytes()
    matter = front_matter(folder)
    assert (matter["base_model"], matter["library_name"]) == ("mistralai/Mistral-7B-v0.1", "peft")
    assert matter["datasets"] == ["PKU-Alignment/PKU-SafeRLHF"]
    assert {"qlora", "dpo", "helpful"} <= set(matter["tags"])
    assert (matter["license"], matter["license_name"]) == ("other", "those-of-base-and-data")
    assert row(folder, "base model")[1:] == ["mistralai/Mistral-7B-v0.1", "apache-2.0"]
    assert row(folder, "data", "PKU-Alignment/PKU-SafeRLHF")[2] == "cc-by-nc-4.0"
    assert row(folder, "revision")[1] == "c0ffee"
    assert row(folder, "digest of its files")[1] == "d1" * 32
    assert row(folder, "samples trained on")[1] == "64"
    assert row(folder, "beta")[1] == "0.1"
    assert row(folder, "trained with peft_align")[1] == "0.0.9"
    assert row(folder, "digest of the base")[1] == "e2" * 32
    assert row(folder, "sha256 of the base's tokenizer.json")[1] == "a1" * 32
    text = (folder / "README.md").read_text(encoding="utf-8")
    for used in ("revision='beef01'", "bnb_4bit_use_double_quant=True", "[INST] {question} [/INST]"):
        assert used in text
    for hidden in ("secret-host", str(tmp_path)):
        assert hidden not in text
    facts = json.loads((folder / "peft_align.json").read_text(encoding="utf-8"))
    assert facts["tokenizer"] == {"tokenizer.json": "a1" * 32}
    assert facts["template"] == "mistral"


def test_the_scores_are_those_of_the_report(tmp_path: Path) -> None:
    """Mean and interval over the seeds of the cell, the base beside them; other cells are none of it."""
    root = tmp_path / "outputs"
    values = {0: 0.50, 1: 0.62, 2: 0.56, -1: 0.25}
    words = ("train.checkpoint_steps=[4]", "evaluation.benchmarks=[everyday_mc]")
    sweep = done(root, "seed=0,1,2", *words, scores=values)
    done(root, "seed=0,1", "method.beta=0.3", *words, scores={0: 0.9, 1: 0.9, -1: 0.25})
    first = trained(sweep)[0]
    folder = exports(root, first.id)
    found = row(folder, "everyday_mc")
    assert found[1:4] == ["acc ↑", "0.5", "0.56"]
    assert found[4] == "0.411 to 0.709"  # 0.56 ± 4.3027 × 0.06 / √3
    assert found[5:] == ["3", "16", "0.25"]
    table = rows(sweep, plan(sweep, root), root)
    assert "run_id" in columns(sweep)
    assert [r["value"] for r in table if r["benchmark"] == "everyday_mc" and r["step"] == 4] == [0.50, 0.62, 0.56]


def test_with_one_seed_the_interval_is_over_the_items(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    (run,) = trained(done(root, "seed=3"))
    assert row(exports(root, run.id), "preference", "accuracy ↑")[4] == "0.255 to 0.745 (items)"


def test_scores_of_another_adapter_and_of_the_validation_split_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    (run,) = trained(done(root, "seed=0"))
    done(root, "seed=0", "evaluation.heldout_split=validation", "evaluation.benchmarks=[preference]", scores={0: 0.987})
    directory = RunDir(root, run.id)
    (path,) = (p for p in directory.path.glob("evaluations/*everyday_mc*/record.json") if '"step": 4' in p.read_text())
    record = json.loads(path.read_text(encoding="utf-8"))
    record["key"]["adapter"] = "f" * 64  # of a training that was done again since
    write_json(path, {k: v for k, v in record.items() if k != "seal"})
    text = (exports(root, run.id) / "README.md").read_text(encoding="utf-8")
    assert "| preference" in text
    assert "0.987" not in text
    assert "| everyday_mc" not in text


def test_a_checkpoint_has_its_own_files_and_scores(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    (run,) = trained(done(root, "seed=0"))
    assert export.verb([run.id, f"root={root}", "--step", "2"]) == 0
    folder = root / "exports" / f"{run.id}-step-2"
    assert (folder / "adapter_model.safetensors").read_bytes() == f"{run.id} at 2".encode()
    assert "step 2, not the last one" in (folder / "README.md").read_text(encoding="utf-8")
    assert "kept: 2, 4" in faults(run.id, f"root={root}", "--step=3")


def test_the_same_again_changes_nothing_and_new_seeds_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "outputs"
    (run,) = trained(done(root, "seed=0"))
    folder = exports(root, run.id)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    exports(root, run.id)
    assert capsys.readouterr().out == f"{folder}: is there already\n"
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done(root, "seed=1")
    exports(root, run.id)
    assert "written again" in capsys.readouterr().out
    assert row(folder, "everyday_mc")[5] == "2"
    (folder / "README.md").write_text("my own words", encoding="utf-8")
    assert "was changed since it was exported: README.md" in faults(run.id, f"root={root}", "--to", str(folder))


def test_a_run_is_named_by_its_beginning_if_only_one_begins_so(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    one, other = trained(done(root, "seed=0,1"))
    exports(root, one.id[:-4])
    begins = "beavertails-helpful"
    assert (told := faults(begins, f"root={root}")).count(begins) >= 3, told
    assert "2 runs begin so" in told
    assert f"did you mean '{other.id}'?" in faults(other.id + "0", f"root={root}")


@pytest.mark.parametrize("damage", [b"x", b"cut"])
def test_a_damaged_adapter_is_refused(tmp_path: Path, damage: bytes) -> None:
    root = tmp_path / "outputs"
    (run,) = trained(done(root, "seed=0"))
    weights = RunDir(root, run.id).adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(damage + whole[1:] if damage == b"x" else whole[:-3])
    told = faults(run.id, f"root={root}")
    assert f"{weights} is damaged" in told
    assert "plan --verify" in told
    assert not (root / "exports" / run.id).exists()


def merge_of(root: Path, saved: Mapping[str, Any]) -> tuple[Run, RunDir]:
    """A merge of two runs that is recorded, with what was saved of it."""
    option = root.parent / "conf"
    write_option(
        option,
        "grid/mine",
        """
        blocks:
          - name: merges
            kind: merge
            axes: {model: [mistral_7b], dataset: [beavertails], peft: [qlora], seed: [0], merge: [linear]}
            inputs: [[{method: sft, preference: harmless}, {method: sft, preference: helpful}]]
            set: {train.max_steps: 4, 'evaluation.benchmarks': [everyday_mc]}
        """,
    )
    sweep = expand("+grid=mine", f"root={root}", space=ConfigSpace([option]))
    for run in sweep.runs:
        write_identity(run, RunDir(root, run.id))
        if run.kind == "train":
            finish_training(root, run, inputs=SOURCES, **MADE)
    (merge,) = (run for run in sweep.runs if run.kind == "merge")
    directory = RunDir(root, merge.id)
    parents = {parent: adapter_digest(RunDir(root, parent).train_record()) for parent in merge.parents}
    record = {"format": FORMAT, "run": merge.id, "stage": "merge", "digest": "f" * 64, "parents": parents}
    write_json(directory.path / "merge.json", {**record, "saved": dict(saved)})
    return merge, directory


def test_a_merge_that_is_a_recipe_says_what_saves_it_as_an_adapter(tmp_path: Path) -> None:
    merge, _ = merge_of(tmp_path / "outputs", {})
    told = faults(merge.id, f"root={tmp_path / 'outputs'}")
    assert "is kept as a recipe" in told
    assert "python -m peft_align.merge +grid=NAME model=mistral_7b merge=linear" in told
    assert "merge.save=adapter" in told


def test_a_merge_that_was_saved_as_an_adapter_is_exported_with_its_inputs(tmp_path: Path) -> None:
    from peft_align.store.records import Digests, inventory

    folder = RunDir(tmp_path / "outputs", "x").root / "made"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"merged")
    (folder / "adapter_config.json").write_bytes(b"{}")
    files = inventory(folder, [path.name for path in folder.iterdir()], Digests())
    saved = {"asked": {}, "files": files, "inputs": {"model": SOURCES["model"]}, "rank": 128, "relative_error": 0.0}
    merge, directory = merge_of(tmp_path / "outputs", {"adapter": saved})
    directory.merged("adapter").parent.mkdir(parents=True)
    folder.rename(directory.merged("adapter"))
    sweep = expand("+grid=mine", f"root={tmp_path / 'outputs'}", space=ConfigSpace([tmp_path / "conf"]))
    for item in plan(sweep, tmp_path / "outputs"):
        for request in item.requests if item.run.kind == "merge" else ():
            finish_evaluation(tmp_path / "outputs", request, [metric("acc", 0.375)])
    target = exports(tmp_path / "outputs", merge.id)
    assert (target / "adapter_model.safetensors").read_bytes() == b"merged"
    text = (target / "README.md").read_text(encoding="utf-8")
    assert "aligned to *harmless* and *helpful* by SFT" in text
    assert row(target, "rank of the adapter")[1] == "128"
    assert row(target, "run", *merge.parents)
    assert row(target, "everyday_mc")[2] == "0.375"
    assert "merge" in front_matter(target)["tags"]


@pytest.mark.parametrize(
    ("own", "base", "data", "expected"),
    [
        (None, "mit", {"a": "mit"}, {"license": "mit"}),
        ("mit", None, {"a": None}, {"license": "mit"}),
        (None, None, {"a": "mit"}, {}),
        (None, "mit", {"a": "mit", "b": None}, {}),
        (None, "mit", {"a": "cc-by-nc-4.0"}, {"license": "other", "license_name": "those-of-base-and-data"}),
    ],
)
def test_a_licence_is_said_where_it_is_known(
    own: str | None, base: str | None, data: dict[str, str | None], expected: dict[str, str]
) -> None:
    assert export.Licences(own, base, data).front_matter() == expected


def test_a_licence_that_nobody_recorded_is_not_made_up(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    (run,) = trained(done(root, "seed=0", "model=vicuna_7b"))
    folder = exports(root, run.id)
    assert row(folder, "base model")[2] == "not recorded: see the hub page"
    assert "license" not in front_matter(folder)


def test_a_run_of_before_has_the_licences_that_options_name_now(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    (run,) = trained(done(root, "seed=0"))
    path = RunDir(root, run.id).path / "run.json"
    identity = json.loads(path.read_text(encoding="utf-8"))
    del identity["config"]["model"]["license"], identity["config"]["dataset"]["license"], identity["seal"]
    write_json(path, identity)
    folder = exports(root, run.id)
    assert (row(folder, "base model")[2], row(folder, "data", "PKU-Alignment/PKU-SafeRLHF")[2]) == (
        *("apache-2.0", "cc-by-nc-4.0"),
    )


class Hub:
    """Stands in for the hub's client: one repository, private or not."""

    private = True
    uploaded: Path | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert private
        assert exist_ok
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> Hub:
        return self

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        Hub.uploaded = folder_path


@pytest.mark.parametrize("private", [True, False])
def test_a_push_goes_to_a_private_repository_of_a_stand_in_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], private: bool
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "private", private)
    monkeypatch.setattr(Hub, "uploaded", None)
    root = tmp_path / "outputs"
    (run,) = trained(done(root, "seed=0"))
    code = export.verb([run.id, f"root={root}", "--push", "me/helpful"])
    shown = capsys.readouterr()
    if private:
        assert (code, Hub.uploaded) == (0, root / "exports" / run.id)
        assert "uploaded: https://huggingface.co/me/helpful" in shown.out
    else:
        assert (code, Hub.uploaded) == (1, None)
        assert "is there and public" in shown.err
        assert (root / "exports" / run.id / "README.md").is_file()


def test_the_examples_of_the_help_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    text = importlib.import_module("peft_align.export").__doc__ or ""
    examples = [shlex.split(line)[3:] for line in text.partition("examples:")[2].splitlines() if "python -m" in line]
    assert len(examples) == 3
    read = [export.read(words) for words in examples]
    assert [asked.step for asked in read] == [None, None, 100]
    assert [asked.push for asked in read] == [None, None, "me/harmless-dpo"]
    assert (read[1].to, read[1].root, read[1].license) == (
        *(Path("adapters/harmless"), Path("/scratch/me/outputs"), "apache-2.0"),
    )


NO_TORCH = (
    "import sys; from peft_align.export import main; code = main()\n"
    "heavy = sorted({'torch', 'datasets', 'transformers', 'huggingface_hub'} & {*sys.modules})\n"
    "print(heavy, file=sys.stderr); sys.exit(code)"
)


def test_an_export_imports_nothing_heavy(tmp_path: Path) -> None:
    (run,) = trained(done(tmp_path / "outputs", "seed=0"))
    done_ = subprocess.run(
        [sys.executable, "-c", NO_TORCH, run.id], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done_.returncode, done_.stderr.strip()) == (0, "[]")


@pytest.mark.slow
def test_an_exported_adapter_answers_by_the_card_s_own_snippet_as_the_run_does(verb: Verb, tmp_path: Path) -> None:
    """Trained for real, then loaded by plain transformers and peft in a program that knows nothing of the run."""
    words = ("model=tiny", "dataset=everyday", "method=sft", "peft=lora", "train.max_steps=3", "train.batch_size=4")
    verb("train", *words, "train.max_length=200", "train.learning_rate=0.05", check=True)
    (run,) = trained(expand(*words, "train.max_length=200", "train.learning_rate=0.05"))
    verb("export", run.id, "--to", "mine", check=True)
    text = (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    program = text.partition("```python\n")[2].partition("```")[0]

    from peft_align.models.adapters import loaded_adapter
    from peft_align.models.loading import load_base

    base = load_base(run.config)
    program = program.replace('"FOLDER"', repr(str(base.folder))).replace("max_new_tokens=256", "max_new_tokens=12")
    program += (
        "print(model.peft_config['default'].r, [round(x, 4) for x in model(inputs).logits[0, -1, :8].tolist()])\n"
    )
    done_ = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "mine", capture_output=True, text=True, timeout=300
    )
    assert done_.returncode == 0, done_.stderr[-2000:]
    import torch

    from peft_align.data.pairs import Message
    from peft_align.data.tokenization import prompt_ids

    ids = prompt_ids([Message("user", "How do I get wine stains out?")], base.tokenizer, "vicuna")
    with loaded_adapter(base, RunDir(tmp_path / "outputs", run.id).adapter) as model, torch.no_grad():
        ours = [round(x, 4) for x in model(torch.tensor([ids])).logits[0, -1, :8].tolist()]
    with torch.no_grad():
        bare = [round(x, 4) for x in base.model(torch.tensor([ids])).logits[0, -1, :8].tolist()]
    assert done_.stdout.splitlines()[-1] == f"64 {ours}"
    assert ours != bare
