"""What is written for Slurm: scripts that a shell takes, with the options asked for, cells, runs and frozen code."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_evaluation, finish_training, metric, plan, trained, write_option

from peft_align import sweep as sweep_verb
from peft_align.config.compose import ConfigSpace, config_dir
from peft_align.errors import InputError
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Sweep
from peft_align.grid.serialize import run_from_plain
from peft_align.launch import job, job_file, queue
from peft_align.launch.local import CPU_MEMORY
from peft_align.launch.slurm import SlurmLauncher
from peft_align.store import code
from peft_align.store.records import read_json
from peft_align.store.runs import RunDir
from peft_align.store.submissions import Submission, submissions

SMALL = ("model=tiny", "dataset=everyday", "train.max_steps=4", "peft=lora", "evaluation.benchmarks=[everyday_mc]")
DRY = ("launcher=slurm", "launcher.dry_run=true")
# In the place of the program: what it was started with, and where.
SHOW = """#!/bin/sh
{ printf '%s\\n' "$0" "$@"; } > "$SHOWN/words"
env -0 > "$SHOWN/environment"
pwd > "$SHOWN/folder"
"""


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Slurm in reach, an own cache, an empty folder."""
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(queue, "answers", lambda: False)
    monkeypatch.chdir(tmp_path)


def written(root: Path, *words: str, space: ConfigSpace | None = None, dirs: Sequence[Path] = ()) -> Submission:
    """The scripts of a sweep, of which nothing is submitted."""
    sweep = expand(*SMALL, *DRY, *words, space=space)
    return submit(sweep, root, words, dirs)


def submit(sweep: Sweep, root: Path, words: Sequence[str] = (), dirs: Sequence[Path] = ()) -> Submission:
    planner = Planner(root, None)
    launcher = SlurmLauncher(sweep, planner, root / "sweeps" / "one", [*SMALL, *DRY, *words], dirs)
    found = launcher.submit([item for item in planner.plan(sweep.runs) if not item.done])
    assert found is not None
    return found


def scripts(submission: Submission) -> dict[str, Path]:
    return {path.stem: path for path in sorted(submission.folder.glob("*.sbatch"))}


def options(script: Path) -> list[str]:
    """The options that sbatch finds in a script, quotes taken off."""
    found = []
    for line in script.read_text(encoding="utf-8").splitlines()[1:]:
        if line and not line.startswith("#"):
            break  # sbatch reads no further
        if line.startswith("#SBATCH"):
            (option,) = shlex.split(line.removeprefix("#SBATCH"))
            found.append(option)
    return found


def option(script: Path, name: str) -> str | None:
    values = [text.partition("=")[2] for text in options(script) if text.partition("=")[0] == f"--{name}"]
    assert len(values) <= 1, values
    return values[0] if values else None


def execute(script: Path, shown: Path, **env: str) -> tuple[list[str], dict[str, str]]:
    """Run a script as Slurm does, with a program that only shows its words and environment."""
    shown.mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", str(script)], env={**os.environ, **env, "SHOWN": str(shown)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pairs = (shown / "environment").read_text(encoding="utf-8").rstrip("\0").split("\0")
    return (shown / "words").read_text(encoding="utf-8").splitlines(), dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture
def program(tmp_path: Path) -> str:
    """A setting that has the scripts start SHOW."""
    path = tmp_path / "program"
    path.write_text(SHOW, encoding="utf-8")
    path.chmod(0o755)
    return f"resources.python='{path}'"


# --- scripts


@pytest.mark.parametrize("folder", ["plain", "two words", "100% of%j", "it's (mine); #1 & $HOME"])
def test_a_shell_takes_every_script_whatever_the_folder_is_called(tmp_path: Path, folder: str) -> None:
    root = tmp_path / folder / "outputs"
    submission = written(root, "method=sft,dpo", "method.init=sft", "resources.setup=['module load cuda/12.4']")
    found = scripts(submission)
    assert sorted(found) == ["00-train", "01-train-evaluate", "02-evaluate", "report"]
    for script in found.values():
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_program_gets_folders_with_blanks_and_percent_signs_as_they_are(tmp_path: Path, program: str) -> None:
    submission = written(tmp_path / "100% of $my runs", program)
    script = scripts(submission)["00-train-evaluate"]
    words, environment = execute(script, tmp_path / "shown", SLURM_ARRAY_TASK_ID="0")
    assert words[1:] == ["-m", "peft_align.launch.job", str(submission.folder / "00-train-evaluate.json"), "0"]
    assert environment["PYTHONPATH"].split(":")[0] == f"{submission.content['folder']}/src"
    assert Path(words[3]).is_file()


def test_logs_lie_in_the_submissions_folder_and_a_percent_sign_of_it_begins_no_pattern(tmp_path: Path) -> None:
    submission = written(tmp_path / "100%a b")
    logs = str(submission.folder / "logs").replace("%", "%%")
    found = scripts(submission)
    assert option(found["00-train-evaluate"], "output") == f"{logs}/00-train-evaluate-%a.log"
    assert option(found["report"], "output") == f"{logs}/report.log"
    assert (submission.folder / "logs").is_dir()
    (array, _) = submission.content["arrays"]
    assert submission.log(array, "17_3") == submission.folder / "logs/00-train-evaluate-3.log"


def test_jobs_start_in_the_folder_of_the_command_since_its_paths_may_be_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "my study"
    here.mkdir()
    monkeypatch.chdir(here)
    assert {option(script, "chdir") for script in scripts(written(Path("outputs"))).values()} == {str(here)}


def test_without_resources_no_script_asks_for_any(tmp_path: Path) -> None:
    own = {"job-name", "chdir", "output", "open-mode", "array", "requeue", "signal"}
    for name, script in scripts(written(tmp_path)).items():
        names = {text.removeprefix("--").partition("=")[0] for text in options(script)}
        assert names == (own if name != "report" else own - {"array", "requeue", "signal"})


def test_a_script_has_what_its_stage_asks_for_and_the_report_what_a_report_does(tmp_path: Path) -> None:
    rules = (
        "resources.rules=[{where:{stage:evaluate},set:{time:'01:00:00'}},{where:{stage:report},set:{gpus:0,mem:1G}}]"
    )
    words = ("resources.gpus=2", "resources.partition=gpu", "resources.extra=['--comment=my study','--nice']", rules)
    found = scripts(written(tmp_path, *words))
    asked = {name: options(script) for name, script in found.items()}
    assert sorted(asked) == ["00-train", "01-evaluate", "report"]
    shared = ["--partition=gpu", "--gpus-per-node=2", "--comment=my study", "--nice"]
    assert asked["00-train"][-4:] == shared
    assert asked["01-evaluate"][-5:] == [shared[0], "--time=01:00:00", *shared[1:]]
    assert asked["report"][-4:] == ["--partition=gpu", "--mem=1G", "--comment=my study", "--nice"]


@pytest.mark.parametrize("throttle", [None, 3])
def test_an_array_has_a_task_for_each_line_of_its_cells(tmp_path: Path, throttle: int | None) -> None:
    words = ("seed=range(5)", "launcher.max_array=4", "launcher.signal_before=77")
    submission = written(tmp_path, *words, *([f"launcher.throttle={throttle}"] if throttle else []))
    asked = [option(script, "array") for name, script in scripts(submission).items() if name != "report"]
    mark = f"%{throttle}" if throttle else ""
    assert asked == [f"0-3{mark}", f"0-0{mark}", f"0-0{mark}"]
    for name, script in scripts(submission).items():
        if name != "report":
            lines = (submission.folder / f"{name}.cells").read_text(encoding="utf-8").splitlines()
            assert option(script, "array") == f"0-{len(lines) - 1}{mark}"
            assert "--requeue" in options(script)
            assert option(script, "signal") == "B:USR1@77"
    assert option(scripts(submission)["report"], "array") is None


def test_setup_is_done_before_the_program_and_the_prefix_starts_it(tmp_path: Path, program: str) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\nexport WRAPPED="$1"\nshift\nexec "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    setup = "resources.setup=['export LOADED=\"a b\"','cd /']"
    submission = written(tmp_path, program, setup, f"resources.prefix='{wrapper} --nv'")
    words, environment = execute(scripts(submission)["00-train-evaluate"], tmp_path / "shown", SLURM_ARRAY_TASK_ID="0")
    assert (environment["LOADED"], environment["WRAPPED"]) == ("a b", "--nv")
    assert (tmp_path / "shown/folder").read_text() == "/\n"
    assert words[:3] == [str(tmp_path / "program"), "-m", "peft_align.launch.job"]


def test_the_program_takes_the_place_of_the_shell_so_that_signals_reach_it(tmp_path: Path) -> None:
    for script in scripts(written(tmp_path)).values():
        (line,) = (line for line in script.read_text().splitlines() if f"{sys.executable} -m" in line)
        assert line.startswith("exec ")
        assert script.read_text().rstrip().endswith(line)


def test_without_a_python_of_its_own_the_one_that_submits_is_used(tmp_path: Path) -> None:
    for script in scripts(written(tmp_path)).values():
        assert f"exec {shlex.quote(sys.executable)} -m peft_align." in script.read_text()


@pytest.mark.parametrize(
    ("words", "env", "threads"),
    [
        ((), {"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "64"}, "6"),
        ((), {"SLURM_CPUS_ON_NODE": "3"}, "3"),
        ((), {}, "1"),
        (("launcher.threads=2",), {"SLURM_CPUS_PER_TASK": "6"}, "2"),
    ],
)
def test_threads_are_the_cpus_that_slurm_gives_or_those_asked_for(
    tmp_path: Path, program: str, words: tuple[str, ...], env: dict[str, str], threads: str
) -> None:
    submission = written(tmp_path, program, *words)
    for name in ("00-train-evaluate", "report"):
        _, environment = execute(scripts(submission)[name], tmp_path / "shown", SLURM_ARRAY_TASK_ID="0", **env)
        assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == (threads, threads)


@pytest.mark.parametrize("offline", [True, False])
def test_tasks_ask_the_hub_only_if_they_may(
    tmp_path: Path, program: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    submission = written(tmp_path, program, f"launcher.offline={str(offline).lower()}")
    _, environment = execute(scripts(submission)["00-train-evaluate"], tmp_path / "shown", SLURM_ARRAY_TASK_ID="0")
    assert environment.get("HF_HUB_OFFLINE") == ("1" if offline else None)
    assert environment.get("HF_DATASETS_OFFLINE") == ("1" if offline else None)


@pytest.mark.parametrize("asked", ["resources.gpus=1", "resources.gres='gpu:1'", "resources.cpus=2"])
def test_where_there_is_no_gpu_memory_is_kept_as_a_cpu_likes_it_unless_the_user_says_how(
    tmp_path: Path, program: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CPU_MEMORY:
        monkeypatch.delenv(name, raising=False)
    script = scripts(written(tmp_path, program, asked))["00-train-evaluate"]
    _, environment = execute(script, tmp_path / "shown", SLURM_ARRAY_TASK_ID="0")
    expected = CPU_MEMORY if "cpus" in asked else {}
    assert {name: environment[name] for name in CPU_MEMORY if name in environment} == expected
    own = dict.fromkeys(CPU_MEMORY, "7")
    _, environment = execute(script, tmp_path / "shown", SLURM_ARRAY_TASK_ID="0", **own)
    assert {name: environment[name] for name in CPU_MEMORY} == own


def test_what_modules_or_the_user_put_on_pythons_path_stays_behind_the_frozen_code(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    submission = written(tmp_path, program, "resources.setup=['export PYTHONPATH=/opt/site:/home/me']")
    _, environment = execute(scripts(submission)["report"], tmp_path / "shown")
    assert environment["PYTHONPATH"].split(":") == [f"{submission.content['folder']}/src", "/opt/site", "/home/me"]


def test_the_report_is_that_of_the_same_words_with_the_frozen_options_of_the_user(tmp_path: Path, program: str) -> None:
    own = tmp_path / "my conf"
    write_option(own, "model/mine", "defaults: [tiny]\n")
    words = (program, "peft.r=8", "seed=0,1")
    submission = written(tmp_path / "root", *words, space=ConfigSpace([own]), dirs=[own])
    shown, _ = execute(scripts(submission)["report"], tmp_path / "shown")
    frozen = Path(submission.content["folder"]) / "config-0"
    given = [*SMALL, *DRY, *words]
    assert shown[1:] == ["-m", "peft_align.report", "--ended", *given, f"--config-dir={frozen}"]
    assert (frozen / "model/mine.yaml").read_text() == "defaults: [tiny]\n"


# --- cells, runs, what a task is told


def test_cells_and_runs_agree_with_each_other_and_with_what_is_recorded(tmp_path: Path) -> None:
    words = ("method=sft,dpo", "method.init=sft", "seed=range(3)", "launcher.runs_per_task=2")
    submission = written(tmp_path, *words)
    sweep = expand(*SMALL, *DRY, *words)
    runs = read_json(submission.folder / "runs.json") or {}
    assert {name: run_from_plain(plain) for name, plain in runs.items()} == sweep.by_id()
    recorded = {array["name"]: array for array in submission.content["arrays"]}
    for name, array in recorded.items():
        lines = (submission.folder / f"{name}.cells").read_text(encoding="utf-8").splitlines()
        assert [line.split() for line in lines] == array["tasks"]
        assert {run for line in lines for run in line.split()} <= set(runs)
        told = read_json(submission.folder / f"{name}.json") or {}
        assert (told["stages"], told["cells"]) == (list(array["stages"]), f"{name}.cells")
        assert (told["root"], told["sweep"], told["attempts"]) == (str(tmp_path), "one", 3)
    assert [len(task) for task in recorded["00-train"]["tasks"]] == [2, 1]


def test_judges_are_told_to_their_tasks_alone(tmp_path: Path) -> None:
    words = ("judge=gpt4", "benchmark.real_toxicity.judge=profanity")
    short = [word for word in SMALL if "benchmarks" not in word]
    sweep = expand(*short, *DRY, *words, "evaluation.benchmarks=[alpaca_eval,real_toxicity]")
    submission = submit(sweep, tmp_path)
    told = {path.stem: (read_json(path) or {}) for path in submission.folder.glob("0*.json")}
    assert {name: content["judges"] for name, content in sorted(told.items())} == {
        "00-train-evaluate": None,
        "01-evaluate": None,
        "02-judge": ["gpt4"],
        "03-judge": ["profanity"],
    }


def test_no_secret_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"OPENAI_API_KEY": "sk-a-secret-that-is-nowhere", "HF_TOKEN": "hf_another-secret-that-is-nowhere"}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    written(tmp_path, "judge=gpt4")
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert [secret for secret in secrets.values() for text in files if secret.encode() in text] == []


@pytest.fixture
def array(tmp_path: Path) -> tuple[Path, dict[str, Any], list[list[str]]]:
    """A submission's folder, what a task of its first array is told, and the runs of its tasks."""
    submission = written(tmp_path, "seed=range(5)", "launcher.runs_per_task=2")
    told = read_json(submission.folder / "00-train-evaluate.json")
    assert told is not None
    tasks: list[list[str]] = submission.content["arrays"][0]["tasks"]
    return submission.folder, told, tasks


def test_a_task_does_the_runs_of_its_line(array: tuple[Path, dict[str, Any], list[list[str]]]) -> None:
    folder, told, tasks = array
    assert [len(task) for task in tasks] == [2, 2, 1]
    for index, task in enumerate(tasks):
        assert [plain["id"] for plain in job_file.of_array(folder, told, str(index))] == task


@pytest.mark.parametrize("index", [3, 1000, -1])
def test_a_task_that_has_no_line_says_so(array: tuple[Path, dict[str, Any], list[list[str]]], index: int) -> None:
    folder, told, _ = array
    with pytest.raises(SystemExit, match=f"00-train-evaluate.cells has no line {index}") as caught:
        job_file.of_array(folder, told, str(index))
    assert str(folder) in str(caught.value)


def test_a_line_with_a_run_that_there_is_not_says_which(array: tuple[Path, dict[str, Any], list[list[str]]]) -> None:
    folder, told, tasks = array
    (folder / told["cells"]).write_text(f"{tasks[0][0]} another-run\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"runs.json has no another-run"):
        job_file.of_array(folder, told, "0")


@pytest.mark.parametrize("index", ["7", "one"])
def test_a_job_with_a_bad_index_ends_with_one_line(
    array: tuple[Path, dict[str, Any], list[list[str]]], index: str
) -> None:
    folder, _, _ = array
    command = [sys.executable, "-m", "peft_align.launch.job", str(folder / "00-train-evaluate.json"), index]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode not in (0, job.SOME_FAILED)
    assert "Traceback" not in done.stderr
    assert index in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- frozen code


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in the place of this one, which can be edited."""
    folder = tmp_path / "checkout/src/peft_align"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "__init__.py").write_text("version = 1\n", encoding="utf-8")
    (folder / "__pycache__/old.pyc").write_bytes(b"old")
    monkeypatch.setattr(code, "package", lambda: folder)
    code.code_digest.cache_clear()
    return folder


def test_what_is_edited_after_a_submission_changes_none_of_its_code(tmp_path: Path, checkout: Path) -> None:
    first = written(tmp_path / "root")
    (checkout / "__init__.py").write_text("version = 2\n", encoding="utf-8")
    second = written(tmp_path / "root")
    frozen = [Path(each.content["folder"]) for each in (first, second)]
    assert frozen[0] != frozen[1]
    assert [(each / "src/peft_align/__init__.py").read_text() for each in frozen] == ["version = 1\n", "version = 2\n"]
    assert first.folder != second.folder
    assert [each.folder for each in submissions(tmp_path / "root")] == [first.folder, second.folder]


def test_a_task_runs_the_frozen_code(tmp_path: Path, checkout: Path) -> None:
    shown = tmp_path / "program"
    ask = "import peft_align; print(peft_align.version, peft_align.__file__)"
    shown.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{ask}"\n', encoding="utf-8")
    shown.chmod(0o755)
    submission = written(tmp_path / "my root", f"resources.python='{shown}'")
    (checkout / "__init__.py").write_text("version = 2\n", encoding="utf-8")
    for script in scripts(submission).values():
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": "0"}
        done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, check=True)
        version, _, path = done.stdout.strip().partition(" ")
        assert version == "1"
        assert Path(path).is_relative_to(submission.content["folder"])


def test_the_frozen_code_finds_the_frozen_options(tmp_path: Path) -> None:
    frozen = Path(written(tmp_path).content["folder"])
    ask = "from peft_align.config.compose import config_dir; print(config_dir())"
    env = {**os.environ, "PYTHONPATH": str(frozen / "src")}
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == frozen / "conf"
    assert (frozen / "conf/config.yaml").read_bytes() == (config_dir() / "config.yaml").read_bytes()


# --- as a command


def told_to(*words: str) -> int:
    return sweep_verb.verb([*SMALL, *words])


def only(root: Path) -> Submission:
    (found,) = submissions(root)
    return found


def test_a_dry_run_writes_everything_and_submits_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told_to(*DRY, "seed=0,1") == 0
    submission = only(tmp_path / "outputs")
    text = capsys.readouterr().out
    assert text.count("not submitted") == 3  # trainings, the baseline, the report
    assert str(submission.folder) in text
    assert sorted(scripts(submission)) == ["00-train-evaluate", "01-evaluate", "report"]
    assert submission.jobs == []
    assert list(submission.tasks()) == []
    assert not (tmp_path / "outputs/runs").exists()
    assert json.loads((submission.folder / "submission.json").read_text())["arrays"] == submission.content["arrays"]


def test_a_dry_run_says_what_is_lacking_before_the_jobs_can_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    words = ["model=mistral_7b", *SMALL[1:], *DRY]
    assert sweep_verb.verb(words) == 0
    told = capsys.readouterr().err
    assert "mistralai/Mistral-7B-v0.1" in told
    assert "peft_align.fetch" in told
    assert only(tmp_path / "outputs").content["arrays"]


def test_without_a_dry_run_what_jobs_would_lack_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(InputError, match=r"mistralai/Mistral-7B-v0\.1.*peft_align\.fetch"):
        sweep_verb.verb(["model=mistral_7b", *SMALL[1:], "launcher=slurm"])
    assert not (tmp_path / "outputs").exists()


def test_only_what_is_missing_is_written(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    sweep = expand(*SMALL, "seed=0,1")
    one, other = trained(sweep)
    finish_training(root, one)
    for item in plan(sweep, root):
        for request in item.requests if item.run.id != other.id else ():
            finish_evaluation(root, request, [metric("acc", 0.5)])
    told_to(*DRY, "seed=0,1")
    arrays = only(root).content["arrays"]
    assert [(array["stages"], array["tasks"]) for array in arrays] == [(["train", "evaluate"], [[other.id]])]


def test_a_sweep_that_is_done_writes_no_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "outputs"
    sweep = expand(*SMALL)
    finish_training(root, trained(sweep)[0])
    for item in plan(sweep, root):
        for request in item.requests:
            finish_evaluation(root, request, [metric("acc", 0.5)])
    assert told_to(*DRY) == 0
    assert submissions(root) == []
    assert "2 done, 0 to do" in capsys.readouterr().out


def test_a_run_that_stopped_too_often_is_left_alone_until_more_attempts_are_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "outputs"
    one, other = trained(expand(*SMALL, "seed=0,1"))
    directory = RunDir(root, one.id)
    directory.path.mkdir(parents=True)
    for _ in range(3):
        directory.fail("train", "out of memory", "out_of_memory")
    told_to(*DRY, "seed=0,1")
    first = only(root)
    text = capsys.readouterr().out
    assert f"left alone after 3 attempts without getting further: {one.id}: train: out of memory" in text
    assert "launcher.attempts=4" in text
    assert one.id not in {run for array in first.content["arrays"] for task in array["tasks"] for run in task}
    told_to(*DRY, "seed=0,1", "launcher.attempts=4")
    _, second = submissions(root)
    planned = {run for array in second.content["arrays"] for task in array["tasks"] for run in task}
    assert {one.id, other.id} <= planned


def test_what_is_left_alone_keeps_the_children_of_a_parent_out_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "outputs"
    words = ("method=sft,dpo", "method.init=sft")
    parent, child = trained(expand(*SMALL, *words))
    directory = RunDir(root, parent.id)
    directory.path.mkdir(parents=True)
    for _ in range(3):
        directory.fail("train", "the loss is nan")
    told_to(*DRY, *words)
    planned = {run for array in only(root).content["arrays"] for task in array["tasks"] for run in task}
    assert parent.id not in planned
    assert child.id not in planned, "it would ask for a node only to find that its parent is not done"


def test_a_trained_parent_whose_evaluation_is_left_alone_has_children(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "outputs"
    words = ("method=sft,dpo", "method.init=sft")
    parent, child = trained(expand(*SMALL, *words))
    finish_training(root, parent)
    for _ in range(3):
        RunDir(root, parent.id).fail("evaluate", "out of memory", "out_of_memory")
    told_to(*DRY, *words)
    planned = {run for array in only(root).content["arrays"] for task in array["tasks"] for run in task}
    assert parent.id not in planned
    assert child.id in planned


def test_a_done_child_of_what_is_trained_again_is_submitted_too_as_it_is_done_here(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    words = ("method=sft,dpo", "method.init=sft")
    sweep = expand(*SMALL, *words)
    parent, child = trained(sweep)
    for run in (parent, child):
        finish_training(root, run)
    for item in plan(sweep, root):
        for request in item.requests:
            finish_evaluation(root, request, [metric("acc", 0.5)])
    (RunDir(root, parent.id).adapter / "adapter_model.safetensors").unlink()
    told_to(*DRY, *words)
    planned = {run for array in only(root).content["arrays"] for task in array["tasks"] for run in task}
    assert planned == {parent.id, child.id}


@pytest.mark.slow
def test_a_written_script_does_its_runs_and_the_report_shows_them(tmp_path: Path) -> None:
    quick = [word for word in SMALL if "max_steps" not in word and "benchmarks" not in word]
    quick += ["train.max_steps=1", "train.batch_size=2", "train.max_length=200", "launcher.threads=1"]
    quick += ["evaluation.benchmarks=[preference]", "evaluation.heldout=2"]
    assert sweep_verb.verb([*quick, *DRY]) == 0
    submission = only(tmp_path / "outputs")
    for name, script in scripts(submission).items():
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": "0"}
        done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
    (table,) = (tmp_path / "outputs/sweeps").glob("*/results.csv")
    assert {line.split(",")[0] for line in table.read_text().splitlines()[1:]}
    items = plan(expand(*quick), tmp_path / "outputs")
    assert [item.why for item in items] == ["", ""]
