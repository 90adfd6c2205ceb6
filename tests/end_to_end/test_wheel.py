"""The built wheel works in another environment, from another folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_plans_from_another_folder_and_carries_conf(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), "."]
    built = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # the dependencies of this environment, but not its checkout of the project: a path file is not followed further
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*words: str) -> str:
        done = subprocess.run([python, *words], cwd=elsewhere, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert str(site) in run("-c", "import peft_align; print(peft_align.__file__)")
    assert {path.name for path in (site / "peft_align/reporting/assets").iterdir()} == {
        *("page.html.jinja", "page.css", "page.js", "charts.js", "run.js", "samples.js"),
    }
    assert "6 runs (4 train, 2 baseline)" in run("-m", "peft_align.plan", "+grid=quickstart")
    words = ["model=tiny", "dataset=everyday", "method=sft", "peft=lora", "train.max_steps=1", "train.batch_size=2"]
    words += ["evaluation.benchmarks=[everyday_mc]", "evaluation.limit=2"]
    shown = run("-m", "peft_align.sweep", *words)
    assert "everyday_mc acc" in shown  # its data and task files are there too
    assert "Not enough runs for 8 of 8 claims.\nOf the 240 published numbers none is measured." in shown
    run("-m", "peft_align.sweep", *words, "seed=1", "launcher=slurm", "launcher.dry_run=true")
    (script,) = (elsewhere / "outputs/sweeps").glob("*/slurm/*/00-train-evaluate.sbatch")
    assert "peft_align.launch.job" in script.read_text()
    (frozen,) = (elsewhere / "outputs/sweeps").glob("*/code/*/src/peft_align/conf/config.yaml")
    assert frozen.is_file()
