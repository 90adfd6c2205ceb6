"""scripts/gpu_check.py on a CPU: all parts hold, what is missing is named, what is wrong is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"
RUN = (
    "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {folder!r}); {before}; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
BEYOND = ("trl", "bitsandbytes", "hydra", "omegaconf", "datasets", "psutil", "lm_eval")


def checked(folder: Path, *words: str, before: str = "pass") -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, findings and what was printed; `before` is run in the process first."""
    found = folder / "check.json"
    code = RUN.format(folder=str(SCRIPT.parent), before=before)
    command = [
        sys.executable,
        "-c",
        code,
        str(SCRIPT),
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--json",
        str(found),
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}  # the script finds the package beside it
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment)
    assert found.is_file(), done.stderr[-2000:]
    content = json.loads(found.read_text(encoding="utf-8"))
    assert content["device"] == "cpu"
    assert content["good"] == (done.returncode == 0)
    return done.returncode, content["findings"], done.stdout


def verdicts(findings: list[dict[str, Any]]) -> dict[str, list[str]]:
    """By part."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        found.setdefault(finding["part"], []).append(finding["verdict"])
    return found


@pytest.mark.slow
def test_all_that_it_looks_at_holds_on_a_cpu(tmp_path: Path) -> None:
    code, findings, said = checked(tmp_path)
    assert code == 0, said
    assert "no GPU is checked" in said
    by_part = verdicts(findings)
    for part, count in {"rows": 4, "layers": 4, "nf4": 2, "prefixes": 2, "engines": 4}.items():
        assert by_part[part].count("holds") == count, said
    assert set(by_part) == {"device", "products", "rows", "layers", "nf4", "prefixes", "engines"}


def test_torch_transformers_and_peft_do_and_what_is_missing_is_named(tmp_path: Path) -> None:
    hidden = f"sys.modules.update(dict.fromkeys({BEYOND}))"
    code, findings, said = checked(tmp_path, "--parts", "device,layers,nf4,engines", before=hidden)
    assert code == 0, said
    by_part = verdicts(findings)
    assert by_part["layers"] == ["holds"] * 4
    assert by_part["nf4"] == by_part["engines"] == ["skipped"]
    assert "cannot be imported: bitsandbytes" in said


def test_what_differs_or_fails_is_a_line_of_the_table_and_the_exit_code_tells(tmp_path: Path) -> None:
    wrong = (
        "sys.path.insert(0, sys.path[0] + '/../src'); import peft_align.models.head as head; "
        "right = head.token_log_probs; head.token_log_probs = lambda *given: right(*given) * 1.1; "
        "import peft_align.models.prefix_scoring as scoring; scoring.log_likelihoods = None"
    )
    code, findings, said = checked(tmp_path, "--parts", "layers,prefixes", before=wrong)
    assert code == 1
    by_part = verdicts(findings)
    assert by_part["layers"] == ["holds", "differs", "holds", "differs"], said
    assert by_part["prefixes"] == ["failed"]
    assert "'NoneType' object is not callable" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [(("--parts", "rows,colums"), "no such part: colums"), (("--model", "nowhere"), "nowhere is not a folder")],
)
def test_what_it_cannot_be_asked_is_told_at_once(words: tuple[str, ...], told: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert told in done.stderr
