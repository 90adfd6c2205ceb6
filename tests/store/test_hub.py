"""Where data and models are found on this machine."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeping import expand, trained

from peft_align.config.identity import short_hash, slug
from peft_align.config.schema import Model
from peft_align.errors import InputError
from peft_align.store.hub import (
    dataset_folder,
    fetch_into,
    find_repository,
    is_here,
    mirrored,
    model_folder,
    names_below,
    not_a_repository,
)
from peft_align.store.sweeps import latest_manifest, sweep_dir, write_manifest

REPO = "Org/name"


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def model(*words: str) -> Model:
    return trained(expand(*words))[0].config.model


def test_the_asked_revision_is_found_before_the_unnamed_one(tmp_path: Path) -> None:
    make(tmp_path, REPO, f"{REPO}@v0", f"{REPO}@v1")
    assert mirrored(str(tmp_path), REPO, "v0") == tmp_path / f"{REPO}@v0"
    assert mirrored(str(tmp_path), REPO, "v2") == tmp_path / REPO
    assert mirrored(str(tmp_path), REPO) == tmp_path / REPO


def test_another_revision_is_not_taken_for_the_asked_one(tmp_path: Path) -> None:
    make(tmp_path, f"{REPO}@v1")
    assert mirrored(str(tmp_path), REPO, "v0") is None
    assert mirrored(str(tmp_path), REPO) is None


def test_without_a_mirror_nothing_is_found(tmp_path: Path) -> None:
    assert mirrored(None, REPO) is None
    assert mirrored(str(tmp_path / "nowhere"), REPO) is None


def test_a_mirror_below_the_home_folder_may_be_written_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path, f"mirror/{REPO}")
    assert mirrored("~/mirror", REPO) == tmp_path / "mirror" / REPO


def test_a_file_is_no_folder_of_a_repository(tmp_path: Path) -> None:
    make(tmp_path, "Org")
    (tmp_path / REPO).touch()
    assert mirrored(str(tmp_path), REPO) is None


def test_datasets_are_found_in_the_package_or_the_mirror(tmp_path: Path) -> None:
    everyday, beavertails = (trained(expand(f"dataset={n}"))[0].config.dataset for n in ("everyday", "beavertails"))
    folder = dataset_folder(everyday, None)
    assert folder is not None
    assert (folder / "harmless-train.jsonl").is_file()
    assert dataset_folder(beavertails, None) is None
    make(tmp_path, f"{beavertails.hub_id}@v0", str(beavertails.hub_id))
    assert dataset_folder(beavertails, str(tmp_path)) == tmp_path / f"{beavertails.hub_id}@v0"


def test_a_model_of_the_cache_counts_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path))
    cached = model("model=smollm2_135m")
    make(tmp_path / "models", str(cached.hub_id))
    assert model_folder(cached, None) is None
    (tmp_path / "models" / str(cached.hub_id) / "complete.json").write_text("{}", encoding="utf-8")
    assert model_folder(cached, None) == tmp_path / "models" / str(cached.hub_id)


def test_a_random_model_of_another_shape_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path))
    tiny = model("model=tiny")
    larger = dataclasses.replace(tiny, shape=dataclasses.replace(tiny.shape, layers=3))
    folder = tmp_path / "models" / f"random-{short_hash(repr(tiny.shape))}"
    make(folder, ".")
    (folder / "complete.json").write_text("{}", encoding="utf-8")
    assert model_folder(tiny, None) == folder
    assert model_folder(larger, None) is None


def test_a_model_of_the_hub_is_found_in_the_mirror(tmp_path: Path) -> None:
    mistral = model("model=mistral_7b")
    assert model_folder(mistral, str(tmp_path)) is None
    make(tmp_path, str(mistral.hub_id))
    assert model_folder(mistral, str(tmp_path)) == tmp_path / str(mistral.hub_id)


def test_a_sweep_is_found_again_by_its_runs_in_any_order(tmp_path: Path) -> None:
    folder = sweep_dir(tmp_path, "my grid", ["b", "a"])
    assert folder == sweep_dir(tmp_path, "my grid", ["a", "b"])
    assert folder != sweep_dir(tmp_path, "my grid", ["a"])
    assert folder.parent == tmp_path / "sweeps"
    assert folder.name.startswith("my_grid-")


def test_the_sweep_started_last_is_remembered(tmp_path: Path) -> None:
    assert latest_manifest(tmp_path) is None
    one, two = (sweep_dir(tmp_path, name, [name]) for name in ("one", "two"))
    for folder, words in ((one, ["+grid=one"]), (two, ["+grid=two"]), (one, ["+grid=one"])):
        time.sleep(0.02)  # file systems tell times of change apart by a tick of the kernel
        write_manifest(folder, words, [], ["id"])
        found = latest_manifest(tmp_path)
        assert found is not None
        assert found["command"] == words


def test_a_repository_is_here_in_the_mirror_or_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert not is_here(REPO, None, "dataset", str(tmp_path))
    make(tmp_path, REPO)
    assert is_here(REPO, None, "dataset", str(tmp_path))
    assert not is_here("Org/other", None, "model", str(tmp_path))
    make(tmp_path, "cache/models--Org--other/snapshots/0123")
    assert not is_here("Org/other", None, "model", None)  # a download that was never finished
    (tmp_path / "cache/models--Org--other/snapshots/0123/config.json").touch()
    assert is_here("Org/other", None, "model", None)
    assert not is_here("Org/other", None, "dataset", None)


# --- Names are never paths to elsewhere

OUTSIDE = [
    "../secret",
    "Org/../../secret",
    "Org/..",
    "..",
    ".",
    "/etc",
    "Org//name",
    "Org/name/more",
    "~/x",
    "Org/name\n",
    "-x\x00",
    "$(touch x)",
    "`touch x`",
    "a;b",
    "Org/na me",
    "Оrg/name",
    "Org/\u202ename",
    "x" * 300,
    "https://me:x@host/a",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_no_repository_is_not_looked_for_and_not_written(tmp_path: Path, name: str) -> None:
    mirror = tmp_path / "a" / "mirror"
    make(mirror, REPO)
    make(tmp_path / "a", "secret")
    assert mirrored(str(mirror), name) is None
    with pytest.raises(ValueError, match="no repository"):
        fetch_into(mirror, name, None, "dataset")
    with pytest.raises(InputError, match="no repository"):
        find_repository(name, None, "dataset", str(mirror))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["Org", "a", "mirror", "name", "secret"]


@pytest.mark.parametrize(
    "revision", ["../../secret", "..", "v0/../../../secret", "/etc", "a b", "$(x)", "v\n0", "v0/", "-" * 201]
)
def test_what_is_no_revision_is_not_looked_for_and_not_written(tmp_path: Path, revision: str) -> None:
    mirror = tmp_path / "a" / "mirror"
    make(mirror, REPO, f"{REPO}@x")
    make(tmp_path / "a", "secret")
    assert mirrored(str(mirror), REPO, revision) is None
    with pytest.raises(ValueError, match="no branch"):
        fetch_into(mirror, REPO, revision, "dataset")
    with pytest.raises(InputError, match="no branch"):
        find_repository(REPO, revision, "dataset", str(mirror))


@pytest.mark.parametrize(
    "name", ["Org/name", "gsm8k", "PKU-Alignment/PKU-SafeRLHF", "a/b.c-d_e", "mistralai/Mistral-7B-v0.1"]
)
@pytest.mark.parametrize("revision", [None, "v0", "main", "refs/pr/1", "0123456789abcdef0123456789abcdef01234567"])
def test_repositories_are_repositories(name: str, revision: str | None) -> None:
    assert not_a_repository(name, revision) is None


def test_all_that_the_shipped_options_name_are_repositories() -> None:
    named = {
        (s.hub_id, s.revision) for run in expand("+grid=full").runs for s in (run.config.model, run.config.dataset)
    }
    assert len(named) > 4
    assert not [name for name in named if name[0] and not_a_repository(*name)]


@given(st.text(), st.none() | st.text())
def test_no_name_whatever_leads_out_of_the_mirror(name: str, revision: str | None) -> None:
    if not_a_repository(name, revision) is None:
        place = Path(os.path.normpath(f"/mirror/{name}@{revision}" if revision else f"/mirror/{name}"))
        assert place.is_relative_to("/mirror")
        assert place != Path("/mirror")


@given(st.lists(st.text(), min_size=1))
def test_a_slug_of_any_words_is_one_plain_name(words: list[str]) -> None:
    found = slug(words)
    assert re.fullmatch(r"[A-Za-z0-9_-]{0,100}", found)
    assert not found.startswith("-"), "or a command would take it for an option"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "{folder}/../other/x.jsonl", "https://evil.example/x.jsonl", "{folder}-2/x"]
)
def test_data_outside_of_its_folder_is_refused(tmp_path: Path, path: str) -> None:
    make(tmp_path, "data", "data-2", "other")
    with pytest.raises(InputError, match="outside of it"):
        names_below(tmp_path / "data", [path.format(folder=tmp_path / "data")])


def test_a_file_of_the_hubs_cache_is_below_its_folder_though_it_is_a_link_to_a_blob(tmp_path: Path) -> None:
    make(tmp_path, "blobs", "snapshots/c1/data")
    (tmp_path / "blobs" / "b").write_text("x")
    (tmp_path / "snapshots/c1/data/x.jsonl").symlink_to(tmp_path / "blobs" / "b")
    folder = tmp_path / "snapshots/c1"
    assert names_below(folder, [folder / "data" / "x.jsonl"]) == ["data/x.jsonl"]
