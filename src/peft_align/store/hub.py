"""Where datasets and models lie on this machine: a mirror folder, the cache, or the package itself.

Nothing here imports torch or reaches the network; `fetch_snapshot` does, when a job needs what is not there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from peft_align.config.identity import short_hash
from peft_align.config.schema import Dataset, Model
from peft_align.errors import Fault, InputError
from peft_align.store.records import cache_dir, read_json, sync_tree, write_json

NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.))*"  # no two dots in turn, none in front
REPOSITORY, REVISION = re.compile(f"{NAME}(?:/{NAME})?"), re.compile(f"{NAME}(?:/{NAME})*")
LONGEST = 200
FETCHED = ".fetched.json"  # in a mirror's folder: which commit it is
WEIGHT_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")  # never pickles


def mirrored(mirror: str | None, repo_id: str, revision: str | None = None) -> Path | None:
    """DIR/<repo id>@<revision> or DIR/<repo id>, if the mirror has it."""
    if mirror is None or not_a_repository(repo_id, revision):
        return None
    names = [f"{repo_id}@{revision}", repo_id] if revision else [repo_id]
    return next((folder for name in names if (folder := Path(mirror).expanduser() / name).is_dir()), None)


def not_a_repository(repo_id: str, revision: str | None) -> str | None:
    """Why these name nothing on the hub, and nothing below a mirror: they are put together to a path there."""
    if not REPOSITORY.fullmatch(repo_id) or len(repo_id) > LONGEST:
        return "is no repository of the hub (NAME or OWNER/NAME) and no folder"
    if revision and (not REVISION.fullmatch(revision) or len(revision) > LONGEST):
        return "has no branch, tag or commit of that name"
    return None


def names_below(folder: Path, paths: Iterable[str | Path]) -> list[str]:
    """The paths relative to the folder. The hub's cache links its files to blobs elsewhere: links are not followed.

    Raises:
        InputError: a path is an address, or outside of the folder: a data set's card can name any file of this machine.
    """
    roots = [Path(os.path.abspath(folder)), folder.resolve()]
    found = []
    for path in [Path(os.path.abspath(each)) for each in paths]:
        name = next((path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root)), None)
        if name is None:
            raise InputError([Fault(str(folder), f"names data outside of it: {path}", "see the top of its README.md")])
        found.append(name)
    return sorted(found)


def dataset_folder(dataset: Dataset, mirror: str | None) -> Path | None:
    """The dataset's folder, if it is on this machine outside the hub's own cache."""
    if dataset.hub_id is None:
        return Path(str(files("peft_align"))) / "data" / dataset.loader
    return mirrored(mirror, dataset.hub_id, dataset.revision)


def data_folder(name: str, mirror: str | None) -> Path | None:
    """The folder of a benchmark's data by its name in a record: a repository of the mirror, or the user's folder."""
    if Path(name).is_absolute():
        return Path(name) if Path(name).is_dir() else None
    return mirrored(mirror, name)


def model_folder(model: Model, mirror: str | None) -> Path | None:
    """The model's folder, if it is on this machine outside the hub's own cache."""
    if model.source == "random":
        folder = cache_dir() / "models" / f"random-{short_hash(repr(model.shape))}"
    elif model.source == "cache":
        folder = cache_dir() / "models" / str(model.hub_id)
    else:
        own = Path(str(model.hub_id)).expanduser()
        return own if own.is_absolute() and own.is_dir() else mirrored(mirror, str(model.hub_id), model.revision)
    return folder if (folder / "complete.json").is_file() else None


def is_here(repo_id: str, revision: str | None, kind: str, mirror: str | None) -> bool:
    """Whether a repository ("dataset" or "model") is on this machine: in the mirror or the hub's own cache."""
    if mirrored(mirror, repo_id, revision) is not None or data_folder(repo_id, mirror) is not None:
        return True
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return any((cache / f"{kind}s--{repo_id.replace('/', '--')}" / "snapshots").glob("*/*"))


def find_repository(
    repo_id: str,
    revision: str | None,
    kind: str,
    mirror: str | None,
    *,
    where: str | None = None,
    patterns: list[str] | None = None,
) -> tuple[Path, str | None]:
    """The folder of a repository, in the mirror or from the hub, and its commit if it is the hub's.

    Args:
        repo_id: the repository; with `where`, a folder of the user's own will do.
        revision: None is unpinned.
        kind: "dataset" or "model".
        mirror: folder that is looked into first.
        where: what the user named it by, for the fault.
        patterns: the files that are needed; None: all of a dataset, what loads of a model.

    Raises:
        InputError: it is not here and cannot be fetched.
    """
    own = Path(repo_id).expanduser()
    found = own.absolute() if where and own.is_dir() else mirrored(mirror, repo_id, revision)
    if found is not None:
        return found, commit_of(found)
    if wrong := not_a_repository(repo_id, revision):
        raise InputError([Fault(where or repo_id, wrong)])
    try:
        return fetch_snapshot(repo_id, revision, kind, patterns)
    except (OSError, ValueError) as error:
        name = f"{repo_id}@{revision}" if revision else repo_id
        looked = ("a folder, " if where else "") + (f"in the mirror {mirror}, " if mirror else "")
        what = f"is neither {looked}in the hub's cache nor reachable: {str(error).splitlines()[0][:200]}"
        raise InputError([Fault(where or name, what, "set hub.mirror=DIR")]) from None


def fetch_into(mirror: Path, repo_id: str, revision: str | None, kind: str) -> Path:
    """Download a repository into its place in a mirror, as a whole; returns its folder, which says its commit.

    Raises:
        OSError, ValueError: it is not reachable, or there is no such.
    """
    from huggingface_hub import HfApi, snapshot_download

    if wrong := not_a_repository(repo_id, revision):  # what would be written outside of the mirror
        raise ValueError(wrong)
    place = mirror / (f"{repo_id}@{revision}" if revision else repo_id)
    allowed = list(WEIGHT_PATTERNS) if kind == "model" else None
    with _as_os_error():
        commit = str(HfApi().repo_info(repo_id, revision=revision, repo_type=kind).sha)
        fresh = place.with_name(f".{place.name}.{commit[:12]}.part")  # kept when interrupted: the next call goes on
        for other in set(place.parent.glob(f".{place.name}.*.part")) - {fresh}:
            shutil.rmtree(other)
        snapshot_download(repo_id, revision=commit, repo_type=kind, allow_patterns=allowed, local_dir=fresh)
    shutil.rmtree(fresh / ".cache", ignore_errors=True)
    write_json(fresh / FETCHED, {"repo": repo_id, "kind": kind, "revision": revision, "commit": commit})
    sync_tree(fresh)
    fresh.replace(place)
    return place


def fetch_snapshot(
    repo_id: str, revision: str | None, kind: str, patterns: list[str] | None = None
) -> tuple[Path, str]:
    """The local folder of a hub repository and its commit; downloads what is missing.

    Raises:
        OSError, ValueError: as huggingface_hub does, when it is neither cached nor reachable.
    """
    from huggingface_hub import snapshot_download

    allowed = list(patterns or WEIGHT_PATTERNS) if kind == "model" else patterns
    with _as_os_error():
        folder = Path(snapshot_download(repo_id, revision=revision, repo_type=kind, allow_patterns=allowed))
    return folder, folder.name


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload a folder into a private repository of models, made where there is none; returns its address.

    Raises:
        OSError, ValueError: it cannot be reached or written, or it is there and public.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _as_os_error():
        address = str(api.create_repo(repo_id, private=True, exist_ok=True))
        if not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} is there and public; name another, or make it private first")
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Adapter and model card of peft_align")
    return address


@contextmanager
def _as_os_error() -> Iterator[None]:
    """The hub's client lets errors of its HTTP library through, whichever that is; here they are OSErrors."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of a mirror was fetched at, if `fetch` filled it."""
    commit = (read_json(folder / FETCHED) or {}).get("commit")
    return None if commit is None else str(commit)
