"""Over real sweeps, seen by Python's own audit hooks: which pickles are read, and that no foreign code is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from sweeping import write_option

from peft_align.config.schema import Shape
from peft_align.models.loading import build_random

HERE = Path(__file__).parent
SHAPE = Shape(2, 32, 4, 2, 64, 259, True)
INSTALLED = (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"])
OPTION = """
source: hub
hub_id: {folder}
revision: null
template: vicuna
shape: {{layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocabulary: 259, tied: true}}
"""
SMALL = (
    "dataset=everyday", "method=sft", "train.max_steps=4", "train.batch_size=2", "train.max_length=128",
    "train.state_every=1",
)  # fmt: skip
INTERRUPTED = """
import sys
from pathlib import Path
from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.grid.expand import build_sweep
from peft_align.models.loading import load_base
from peft_align.store.runs import RunDir
from peft_align.training.run import Interrupted, train

made = []
for run in build_sweep(ConfigSpace([Path("conf").resolve()]), parse(sys.argv[1:])).runs:
    if run.kind == "train":
        try:
            base, directory = load_base(run.config), RunDir(Path("outputs"), run.id)
            train(run, directory, base, lambda metrics, step: made.append(step), lambda: len(made) == 2)
        except Interrupted:
            made.clear()
"""
Noted = list[tuple[str, str, list[str]]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose folder is full of code and pickles."""
    folder = tmp_path_factory.mktemp("audited")
    model = folder / "model"
    shutil.copytree(build_random(SHAPE), model)
    code = f"import pathlib; pathlib.Path({str(folder / 'sung')!r}).touch()\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (model / name).write_text(code, encoding="utf-8")
    for name, more in (
        ("config.json", {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "tokenization_evil.Evil"]}),
    ):
        content = json.loads((model / name).read_text(encoding="utf-8")) | {"auto_map": more}
        (model / name).write_text(json.dumps(content), encoding="utf-8")
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(json.JSONDecoder))
    write_option(folder / "conf", "model/foreign", OPTION.format(folder=model))
    return folder


def audited(place: Path, *command: str) -> Noted:
    """Run a program and everything that it starts; what was noted."""
    log = place / "audit.jsonl"
    log.unlink(missing_ok=True)
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    watched = os.pathsep.join(str(place / name) for name in ("model", "outputs"))
    env = {**os.environ, "PYTHONPATH": path, "AUDIT_LOG": str(log), "AUDIT_BELOW": watched}
    done = subprocess.run([sys.executable, *command], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return [tuple(json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []  # type: ignore[misc]


def check(place: Path, noted: Noted) -> None:
    """Every pickle that was read is a state of this root or a part of an installed package; no code was run."""
    assert not [what for kind, what, _ in noted if kind == "run"]
    assert not (place / "sung").exists()
    for kind, what, files in noted:
        if kind == "opened":
            path = Path(os.path.normpath(place / what))
            is_state = path.is_relative_to(place / "outputs" / "runs") and path.parents[1].name == "state"
            assert is_state or str(path).startswith(INSTALLED), path
        if kind == "unpickled":  # torch's own reader with weights_only finds no class
            readers = [file for file in files if "/multiprocessing/" in file or "/joblib/" in file]
            assert readers, (what, files)


def test_the_hooks_note_what_they_are_for(place: Path) -> None:
    (place / "model" / "seen.py").write_text("x = 1\n", encoding="utf-8")
    program = (
        "import json, pickle, runpy; pickle.load(open('model/optimizer.pt', 'rb')); runpy.run_path('model/seen.py')"
    )
    noted = audited(
        place, "-c", f"import os; os.chdir({str(place)!r}); {program.replace('model/seen', str(place / 'model/seen'))}"
    )
    assert {kind for kind, _, _ in noted} == {"unpickled", "opened", "run"}
    assert ("opened", "model/optimizer.pt", []) in noted
    with pytest.raises(AssertionError):
        check(place, noted)


@pytest.mark.slow
def test_a_sweep_on_a_foreign_model_reads_no_pickle_but_its_own_states_and_runs_no_code_of_it(place: Path) -> None:
    words = [*SMALL, "model=foreign", "peft=lora,qlora", "evaluation.benchmarks=[preference]", "evaluation.heldout=4"]
    noted = audited(place, "-c", INTERRUPTED, *words)
    runs = {path.parents[2] for path in place.glob("outputs/runs/*/state/step-*/record.json")}
    assert len(runs) == 2, "both were interrupted"
    noted += audited(place, "-m", "peft_align.sweep", "--config-dir=conf", *words)
    opened = {Path(what).name for kind, what, _ in noted if kind == "opened"}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= opened, "the states were gone on from"
    check(place, noted)


@pytest.mark.slow
def test_the_scorer_of_a_wheel_reads_the_pickles_of_the_wheel(place: Path) -> None:
    program = "from peft_align.evaluation.local_judges import profanity; print(profanity()(['a text']))"
    noted = audited(place, "-c", program)
    pickles = [Path(what) for kind, what, _ in noted if kind == "opened"]
    assert pickles, "it reads some, which SECURITY.md says"
    assert {path.parts[-3] for path in pickles} == {"profanity_check"}
    check(place, noted)
