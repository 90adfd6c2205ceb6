"""Every command in README and docs runs; every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from programs import in_this_process, program

REPOSITORY = Path(__file__).parents[1]


PAGES = [
    *(REPOSITORY / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\((?!https?:|#)([^)#]+)[^)]*\)")
# Models that this machine cannot train: their commands are planned instead.
PLANNED = ("+grid=full", "+grid=main", "+grid=merge")


def blocks() -> list[tuple[str, str]]:
    """(page, commands) for each shell block; its lines may build on each other."""
    found = []
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "sh" and block.strip():
                found.append((page.name, block.strip()))
    return found


def own_configs(folder: Path) -> None:
    """The YAML files that the pages show, under the names that they give them."""
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            first = block.splitlines()[0]
            if language == "yaml" and first.startswith("# my_configs/"):
                path = folder / first.removeprefix("# ")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block, encoding="utf-8")


def run(page: str, words: list[str], folder: Path, request: pytest.FixtureRequest) -> subprocess.CompletedProcess[str]:
    """Do what a command says, the verb first: what people read first as it is written, the others in this process."""
    if page == "README.md" and words[0] in ("sweep", "train"):
        return program(words, folder, timeout=300)
    if words[0] in ("sweep", "evaluate"):
        request.getfixturevalue("small_lm_eval")
        assert not any(word.startswith("launcher=") for word in words)
        words = [*words, "launcher=debug"]
    return in_this_process(words, folder)


@pytest.mark.parametrize(("page", "block"), blocks(), ids=lambda text: " ".join(text.split())[:60])
def test_the_commands_run(page: str, block: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    own_configs(tmp_path)
    for command in block.splitlines():
        words = shlex.split(command)
        if words[0] == "make":
            shown = subprocess.run(["make", "-n", words[1]], cwd=REPOSITORY, capture_output=True, text=True)
            assert shown.returncode == 0, shown.stderr
            continue
        assert words[:2] == ["python", "-m"]
        assert words[2].startswith("peft_align.")
        words = [words[2].removeprefix("peft_align."), *words[3:]]
        if "hub.mirror=mirror" in words:
            (tmp_path / "mirror").symlink_to(request.getfixturevalue("mirror"))
        if any(word in PLANNED for word in words):
            words[0] = "plan"
        done = run(page, words, tmp_path, request)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_make_quickstart_runs_what_the_readme_says() -> None:
    shown = subprocess.run(["make", "-n", "quickstart"], cwd=REPOSITORY, capture_output=True, text=True)
    assert "-m peft_align.sweep +grid=quickstart" in shown.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_names_of_files_and_settings_in_the_pages_exist() -> None:
    for page in PAGES:
        for name in re.findall(
            r"`((?:src|tests|conf|scripts|benchmarks)/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8")
        ):
            if "NAME" not in name and "dpo_strong" not in name:
                assert (REPOSITORY / name).exists(), f"{page.name}: {name}"
