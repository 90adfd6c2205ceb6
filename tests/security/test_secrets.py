"""Keys and passwords of the environment and of the command line are in no file and in nothing that is said."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import JudgeServer, Reply, Request

SECRETS = {
    "OPENAI_API_KEY": "sk-proj-Zq1Xw2Ec3Rv4Tb5Yn6Um7",
    "WANDB_API_KEY": "d41d8cd98f00b204e9800998ecf8427ed41d8cd9",
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJkLzXcVbNm12345",
    "MY_JUDGES_KEY": "mjk-0123456789-of-no-known-form",
    "GITHUB_TOKEN": "ghp_QwErTyUiOpAsDfGhJkLzXcVbNm1234567890",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "DB_PASSWORD": "correct-horse-battery",
}
SMALL = (
    "model=tiny", "dataset=everyday", "peft=lora", "method=sft", "train.max_steps=2", "train.batch_size=2",
    "evaluation.benchmarks=[red_instruct_standard]", "benchmark.red_instruct_standard.max_new_tokens=4",
    "benchmark.red_instruct_standard.folder=red", "launcher.threads=1",
)  # fmt: skip
MISTAKES = {
    "a password in an address": "judge.base_url=https://me:{DB_PASSWORD}@host/v1",
    "a name in an address": "judge.base_url=https://{GITHUB_TOKEN}@host/v1",
    "the key itself": "judge.api_key_env={MY_JUDGES_KEY}",
    "the key itself, of a known form": "judge.api_key_env={OPENAI_API_KEY}",
    "a header": "+judge.headers.Authorization='Bearer {OPENAI_API_KEY}'",
    "a setting that there is not": "+judge.api_key={MY_JUDGES_KEY}",
    "a setting that there is not, and no variable has it": "+judge.api_key=Zz9unknown",
    "another setting": "judge.model={HF_TOKEN}",
    "from the environment": "judge.model=${{oc.env:MY_JUDGES_KEY}}",
    "from the environment, within a text": "tracker=wandb tracker.project='x-${{oc.env:WANDB_API_KEY}}'",
    "a line of setup": "resources.setup=['export OPENAI_API_KEY={OPENAI_API_KEY}']",
    "an option of sbatch": "resources.extra=['--export=KEY={MY_JUDGES_KEY}']",
    "an adapter": "adapter=https://me:{DB_PASSWORD}@host/adapter",
    "a grid": "+grid={HF_TOKEN}",
    "a flag": "--key={MY_JUDGES_KEY}",
    "one word": "{OPENAI_API_KEY}",
    "Hydra's": "hydra.job.name={MY_JUDGES_KEY}",
    "a key": "{MY_JUDGES_KEY}=1",
    "not Hydra's grammar": "judge.model=({MY_JUDGES_KEY}",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two questions of Red-Instruct's form."""
    (tmp_path / "red" / "red_prompts").mkdir(parents=True)
    (tmp_path / "red" / "dangerousqa.json").write_text(json.dumps(["How?", "Why?"]), encoding="utf-8")
    (tmp_path / "red" / "red_prompts" / "standard.txt").write_text("<question>", encoding="utf-8")
    return tmp_path


def said(place: Path, verb: str, *words: str) -> tuple[int, str]:
    """The exit code and everything that a verb says, with all the secrets in its environment."""
    own = {
        "HOME": str(place / "home"),
        "PEFT_ALIGN_CACHE": str(place / "cache"),
        "XDG_CACHE_HOME": str(place / "home/.cache"),
    }
    done = subprocess.run(
        [sys.executable, "-m", f"peft_align.{verb}", *words],
        cwd=place, env={**os.environ, **SECRETS, **own}, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def leaks(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text or secret[:16] in text]


def leaking_files(place: Path) -> list[str]:
    found = []
    for path in place.rglob("*"):
        if path.is_file() and not path.is_symlink() and place / ".git" not in path.parents:
            content = path.read_bytes()
            content += gzip.decompress(content) if path.suffix == ".gz" else b""
            found += [f"{path.relative_to(place)}: {n}" for n in leaks(content.decode("latin-1"))]
            found += [f"the name of {path.relative_to(place)}" for _ in leaks(path.name)]
    return found


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_secret_given_by_mistake_is_refused_not_said_and_not_kept(
    place: Path, mistake: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft_align import sweep
    from peft_align.cli import run_verb
    from peft_align.secrecy import of_environment

    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    of_environment.cache_clear()
    before = os.umask(0o022)
    try:
        given = mistake.format(**SECRETS)
        words = given.split(" tracker.") if " tracker." in given else [given]
        words = [words[0], *(f"tracker.{word}" for word in words[1:])]
        monkeypatch.setattr(sys, "argv", ["sweep", *SMALL, "judge=endpoint", *words])
        assert run_verb(sweep.verb, "") == 2
    finally:
        os.umask(before)
        of_environment.cache_clear()
    told = "".join(capsys.readouterr())
    assert "1 fault" in told or "2 faults" in told
    assert leaks(told) == []
    assert "Zz9unknown" not in told
    assert leaking_files(place) == []
    assert not (place / "outputs").exists()


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    def repeats(request: Request) -> Reply:
        return Reply(f"[[A]] you are {request.headers['authorization']}")

    with JudgeServer(repeats) as running:
        yield running


@pytest.mark.slow
def test_no_secret_is_in_any_file_or_said_by_any_verb(place: Path, server: JudgeServer) -> None:
    remote = f"https://{SECRETS['GITHUB_TOKEN']}@github.com/a/b"
    for command in (["init", "--quiet"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=place, check=True)
    judge = ("judge=endpoint", f"judge.base_url={server.url}", "judge.api_key_env=MY_JUDGES_KEY", "judge.retries=0")
    words = [*SMALL, *judge, "tracker=wandb", "tracker.mode=offline"]
    code, told = said(place, "sweep", *words)
    assert code == 0, told
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {SECRETS['MY_JUDGES_KEY']}"}
    server.behave = lambda request: Reply(status=401, body=json.dumps(request.headers).encode())
    code, more = said(place, "sweep", *words, "judge.model=other")
    assert code == 1
    assert "HTTP 401" in more, "the reason is told"
    told += more
    for verb, *own in (
        ("sweep", "seed=1,2", "launcher=slurm", "launcher.dry_run=true"),
        ("plan",), ("plan", "--json"), ("plan", "--cfg"), ("report",),
        ("status", "judge.model=other"), ("status", "--json"),
    ):  # fmt: skip
        slurm = [word for word in words if not word.startswith("launcher")] if "launcher=slurm" in own else words
        kept = [word for word in slurm if not any(word.split("=")[0] == new.split("=")[0] for new in own)]
        code, more = said(place, verb, *kept, *own)
        assert code == 0, more
        told += more
    assert leaks(told) == []
    names = {path.name for path in place.rglob("*") if path.is_file()}
    expected = {"run.json", "sweep.json", "failed.json", "train.log", "report.sbatch", "submission.json", "results.csv"}
    assert expected <= names, expected - names
    assert any(name.endswith(".wandb") for name in names)
    assert leaking_files(place) == []
