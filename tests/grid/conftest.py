"""Grids written by a test, expanded like those of a user's own folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sweeping import expand, faults, write_option

from peft_align.config.compose import ConfigSpace
from peft_align.grid.runs import Sweep

Grid = Callable[..., Sweep]
GridFaults = Callable[..., list[str]]


@pytest.fixture(scope="session")
def grid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own folder; grids are read anew each time."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "grid").mkdir()
    return folder


@pytest.fixture(scope="session")
def grid_space(grid_folder: Path) -> ConfigSpace:
    """The shipped options with the grids of the user's folder."""
    return ConfigSpace([grid_folder])


@pytest.fixture(scope="session")
def grid(grid_folder: Path, grid_space: ConfigSpace) -> Grid:
    """Expand a grid given as YAML, under overrides; further grids by their names."""

    def run(text: str, *overrides: str, **others: str) -> Sweep:
        for name, content in ({"mine": text} | others).items():
            write_option(grid_folder, f"grid/{name}", content)
        return expand("+grid=mine", *overrides, space=grid_space)

    return run


@pytest.fixture(scope="session")
def grid_faults(grid_folder: Path, grid_space: ConfigSpace) -> GridFaults:
    """The faults that a grid given as YAML is refused for."""

    def run(text: str, *overrides: str, **others: str) -> list[str]:
        for name, content in ({"mine": text} | others).items():
            write_option(grid_folder, f"grid/{name}", content)
        return faults("+grid=mine", *overrides, space=grid_space)

    return run
