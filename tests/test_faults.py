"""What is wrong with a command line is told at once, with what would be right; nothing is started or made."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sweeping import write_option

from peft_align.cli import ask
from peft_align.errors import InputError

Verb = Callable[..., "subprocess.CompletedProcess[str]"]
FLAGS = ("--json", "--cfg")

CASES: dict[str, tuple[list[str], list[str]]] = {
    "misspelled key": (["method=dpo", "method.betta=.2"], ["method.betta=.2: no such key", "'method.beta'?"]),
    "misspelled key with +": (["+method.betta=.2"], ["+method.betta=.2: no such key", "'method.beta'?"]),
    "misspelled key with ++": (["++method.betta=.2"], ["++method.betta=.2: no such key", "'method.beta'?"]),
    "misspelled grid": (["+grdi=full"], ["+grdi=full: no such key", "'grid'?"]),
    "unknown grid": (["+grid=ful"], ["grid=ful: no such option", "'full'?"]),
    "misspelled option": (["model=mistal_7b"], ["model=mistal_7b: model has no option", "'mistral_7b'?"]),
    "one misspelled option of several": (["model=tiny,tinny"], ["model=tiny,tinny", "'tiny'?"]),
    "key without its group": (["beta=.2"], ["beta=.2: no such key", "'method.beta'?"]),
    "group as a value": (["method.adapter=4"], ["is a group of settings"]),
    "wrong type": (["peft.r=eight"], ["peft.r=eight: 'eight' is not a whole number"]),
    "text for a number": (["train.learning_rate='1e-4'"], ["is not a number"]),
    "number for a truth": (["train.gradient_checkpointing=1"], ["is not true or false"]),
    "value for a list": (["peft.target_modules=q_proj"], ["a list of at least one value is expected"]),
    "out of range": (["peft.r=0"], ["peft.r=0: 0 is out of range", "at least 1"]),
    "at an open bound": (["method=dpo", "method.beta=0"], ["out of range", "above 0"]),
    "one of several out of range": (["seed=0,-1"], ["-1 is out of range"]),
    "no choice": (["train.schedule=cosin"], ["train.schedule=cosin", "'cosine'?"]),
    "empty value": (["seed="], ["seed=: the value is empty"]),
    "empty option": (["model="], ["model=: the value is empty"]),
    "null where a value is due": (["peft.r=null"], ["peft.r=null: the value is empty"]),
    "unparsable": (["a=[1"], ["a=[1: not an override"]),
    "no override": (["full"], ["full: not an override"]),
    "unknown flag": (["--jsn", "seed=1"], ["--jsn: no such flag", "'--json'?"]),
    "abbreviated flag": (["--js", "seed=1"], ["--js: no such flag"]),
    "hydra's misspelled key": (["hydra.vrbose=1", "seed=1"], ["hydra.vrbose=1: Could not override"]),
    "hydra's misspelled key alone": (["hydra.vrbose=1"], ["hydra.vrbose=1: Could not override"]),
    "multirun": (["--multirun", "seed=1"], ["--multirun: Hydra's multirun is not used here", "+grid=NAME"]),
    "multirun, short": (["-m", "seed=1"], ["-m: Hydra's multirun is not used here"]),
    "deleted key": (["~seed"], ["~seed: settings cannot be deleted"]),
    "deleted option": (["~model=tiny"], ["~model=tiny: settings cannot be deleted"]),
    "key given twice": (["seed=1", "seed=2"], ["seed=2: 'seed' is given twice", "seed=1"]),
    "step beyond the last": (
        ["train.max_steps=4", "train.checkpoint_steps=[2,8]"],
        ["train.checkpoint_steps: step 8 is beyond train.max_steps=4"],
    ),
    "unknown benchmark": (["evaluation.benchmarks=[mmul]"], ["evaluation.benchmarks: mmul", "'mmlu'?"]),
    "preference that the dataset lacks": (
        ["dataset=hh_rlhf", "preference=mixture"],
        ["dataset hh_rlhf has no preference 'mixture'", "it is defined for beavertails, everyday"],
    ),
    "setting of no run": (["method=sft", "method.beta=.2"], ["method.beta=.2: no run of this sweep has it"]),
    "operational axis": (["train.micro_batch_size=1,2"], ["operational", "cannot be an axis"]),
    "axis of the sweep as a whole": (["root=a,b", "seed=1"], ["root=a,b: holds for a sweep as a whole"]),
    "dangling interpolation": (["peft.r=${peft.rr}"], ["${peft.rr}: refers to a setting that does not exist"]),
    "circular interpolation": (["peft.r=${peft.r}"], ["refers to itself"]),
    "own folder that does not exist": (["--config-dir", "nowhere", "seed=1"], ["'nowhere' is not a folder"]),
    "nothing": ([], ["nothing is asked for", "+grid=NAME"]),
}


def told(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What people are shown for a command line in an empty folder, which stays empty."""
    monkeypatch.chdir(folder)
    with pytest.raises(InputError) as caught:
        ask(words, FLAGS)
    assert list(folder.iterdir()) == []
    return caught.value.render()


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_told_and_nothing_is_made(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, messages = CASES[case]
    text = told(words, tmp_path, monkeypatch)
    assert text.startswith("peft_align: 1 fault in the input; nothing was started.\n")
    for message in messages:
        assert message in text


SEVERAL = {
    "the line and its keys": (
        ["--jsn", "--multirun", "a=[1", "~seed", "hydra.vrbose=1", "seed=", "+grdi=full"],
        ["method.betta=.2", "model=mistal_7b", "peft.r=0", "root=a,b", "train.micro_batch_size=1,2"],
    ),
    "a grid and its overrides": (["+grid=quikstart", "+grid=mian"], ["model=mistal_7b", "peft.r=eight"]),
    "a flag and an operational axis": (["--jsn"], ["evaluation.limit=1,2"]),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_faults_are_all_in_one_message(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for part in SEVERAL[case] for word in part]
    text = told(words, tmp_path, monkeypatch)
    shown = [word.removeprefix("+") if "grid=" in word else word for word in words]
    assert [word for word in shown if f"  - {word}: " not in text] == []
    assert text.startswith(f"peft_align: {len(words)} faults in the input")


def test_faults_of_values_found_while_building_are_told_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train.checkpoint_steps=[900]", "evaluation.benchmarks=[mmul]", "dataset=hh_rlhf,beavertails"]
    text = told([*words, "preference=mixture"], tmp_path, monkeypatch)
    for message in ("step 900 is beyond", "mmul", "hh_rlhf has no preference"):
        assert message in text


@pytest.mark.parametrize("name", ["plan", "sweep"])
@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["method.betta=.2"], ["did you mean 'method.beta'?"]),
        (["a=[1", "~seed", "--jsn", "--multirun"], ["4 faults", "a=[1", "~seed", "--jsn", "--multirun"]),
        (["hydra.vrbose=1", "model=mistal_7b"], ["2 faults", "hydra.vrbose=1", "did you mean 'mistral_7b'?"]),
    ],
    ids=["key", "words", "values"],
)
def test_a_refused_program_exits_with_2_and_leaves_nothing(
    verb: Verb, tmp_path: Path, name: str, words: list[str], messages: list[str]
) -> None:
    done = verb(name, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "nothing was started" in done.stderr
    for message in messages:
        assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plan", "sweep"])
def test_a_child_whose_rank_differs_from_its_parents_is_refused(
    verb: Verb, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder = tmp_path_factory.mktemp("conf")
    text = """
    blocks:
      - axes: {method: [sft, dpo]}
        set: {model: tiny, dataset: everyday, method.init: sft}
        when: [{where: {method: dpo}, axes: {peft.r: [8]}}]
    """
    write_option(folder, "grid/differing", text)
    done = verb(name, "+grid=differing", "--config-dir", str(folder))
    assert done.returncode == 2
    assert "peft.r=8: 8 differs from the SFT run's 64" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_its_model_or_its_mirror_starts_nothing(
    verb: Verb, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("empty")))
    done = verb("sweep", "+grid=quickstart")
    assert done.returncode == 2
    assert "model=smollm2_135m: smollm2-135m-instruct" in done.stderr
    assert "scripts/fetch_smollm2.py" in done.stderr
    done = verb("sweep", "model=tiny", "hub.mirror=nowhere")
    assert done.returncode == 2
    assert "hub.mirror=nowhere: is not a folder" in done.stderr
    assert list(tmp_path.iterdir()) == []
