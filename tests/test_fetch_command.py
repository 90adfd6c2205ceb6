"""fetch fills a mirror from a hub, here one that this test serves; what it fetched is read without a network then."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from sweeping import expand, trained, write_option

from peft_align.models.loading import build_random
from peft_align.store.hub import FETCHED

Fetch = Callable[..., "subprocess.CompletedProcess[str]"]
DATA, MODEL = "PKU-Alignment/PKU-SafeRLHF", "Someone/tiny-llama"
# BeaverTails' rows, of which every one has a better and exactly one safe response.
ROWS = [
    {
        "prompt": f"Question {i}?", "response_0": f"A fine answer {i}.", "response_1": f"Another answer {i}.",
        "is_response_0_safe": i % 2 == 0, "is_response_1_safe": i % 2 == 1,
        "better_response_id": i % 2, "safer_response_id": i % 2,
    }
    for i in range(40)
]  # fmt: skip
PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "extra/vectors.pkl")
OPTION = """
source: hub
hub_id: Someone/tiny-llama
revision: null
template: vicuna
shape: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocabulary: 259, tied: true}
"""


@dataclass
class Hub:
    """The part of the hub's API that huggingface_hub asks for a snapshot: info, tree, files."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)  # "datasets/Org/name" or "models/Org/name"
    requests: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # ends of paths that are cut in the middle
    url: str = ""

    def commit(self, name: str) -> str:
        files = self.repos[name]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if parts[:1] == ["api"] and len(parts) >= 4:
            name, rest = "/".join(parts[1:4]), parts[4:]
            if name not in self.repos:
                return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
            if rest[:1] == ["tree"]:
                return 200, {}, json.dumps(self._tree(name)).encode()
            if rest in ([], ["revision", "main"]) or rest[:1] == ["revision"]:
                told = {"id": "/".join(parts[2:4]), "sha": self.commit(name), "siblings": [], "tags": []}
                return 200, {}, json.dumps(told | {"private": False, "downloads": 0, "likes": 0}).encode()
        if "resolve" in parts:
            at = parts.index("resolve")
            kind = [] if parts[0] == "datasets" else ["models"]
            name, file = "/".join([*kind, *parts[:at]]), "/".join(parts[at + 2 :])
            body = self.repos.get(name, {}).get(file)
            if body is not None:
                etag = hashlib.sha256(body).hexdigest()
                return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit(name)}, body
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def _tree(self, name: str) -> list[dict[str, Any]]:
        files = self.repos[name]
        return [
            {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for path, body in sorted(files.items())
        ]

    def fetched(self) -> list[str]:
        """The files whose bodies were asked for."""
        asked = (urlsplit(request[4:]).path for request in self.requests if request.startswith("GET "))
        return [path.partition("/resolve/")[2].partition("/")[2] for path in asked if "/resolve/" in path]


@pytest.fixture
def hub(served: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    found = Hub({name: dict(files) for name, files in served.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(True)

        def do_HEAD(self) -> None:
            self._answer(False)

        def _answer(self, whole: bool) -> None:
            found.requests.append(f"{self.command} {self.path}")
            status, headers, body = found.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if whole and any(self.path.endswith(end) for end in found.broken):
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
            elif whole:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """A dataset of BeaverTails' kind and a model with random weights, each with files that are not needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("models")))
        folder = build_random(trained(expand("model=tiny", "dataset=everyday"))[0].config.model.shape)
        model = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "complete.json"}
    lines = {"train": ROWS[:30], "test": ROWS[30:]}
    data = {f"data/{split}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for split, rows in lines.items()}
    return {
        f"datasets/{DATA}": {"README.md": b"# pairs\n", **{name: text.encode() for name, text in data.items()}},
        f"models/{MODEL}": model | {"README.md": b"# tiny\n"} | dict.fromkeys(PICKLES, b"\x80\x04pickle"),
    }


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the served model as an option."""
    folder = tmp_path_factory.mktemp("conf")
    write_option(folder, "model/served", OPTION)
    return folder


@pytest.fixture
def run(hub: Hub, own: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Fetch:
    """Run a verb in an empty folder on a machine that knows only this hub."""
    caches = tmp_path_factory.mktemp("caches")
    shut_out = {name for name in os.environ if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy")}
    clean = {name: value for name, value in os.environ.items() if name not in shut_out}
    clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(caches / "hf"), "PEFT_ALIGN_CACHE": str(caches / "own")}

    def call(verb: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"peft_align.{verb}", *words, f"--config-dir={own}"]
        return subprocess.run(command, cwd=tmp_path, env=clean | env, capture_output=True, text=True, timeout=300)

    return call


WORDS = (
    "model=served", "dataset=beavertails", "preference=harmless", "method=sft", "peft=lora", "train.max_steps=1",
    "train.batch_size=2", "train.max_length=200", "evaluation.benchmarks=[preference]", "evaluation.heldout=2",
    "hub.mirror=mirror",
)  # fmt: skip
PLACES = (f"{DATA}@v0", MODEL)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fine(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_what_a_sweep_needs_is_fetched_into_the_mirror_with_its_commit_and_without_pickles(
    run: Fetch, hub: Hub, tmp_path: Path
) -> None:
    told = fine(run("fetch", *WORDS))
    assert f"dataset {DATA}@v0 (dataset=beavertails)" in told
    assert f"model {MODEL} (model=served)" in told
    assert "2 of 2 fetched into mirror" in told
    data, model = (content(tmp_path / "mirror" / place) for place in PLACES)
    records = [json.loads(found.pop(FETCHED)) for found in (data, model)]
    assert [(r["repo"], r["kind"], r["revision"]) for r in records] == [(DATA, "dataset", "v0"), (MODEL, "model", None)]
    assert [r["commit"] for r in records] == [hub.commit(f"datasets/{DATA}"), hub.commit(f"models/{MODEL}")]
    assert data == hub.repos[f"datasets/{DATA}"]
    weights = {"config.json", "model.safetensors", "tokenizer.json"}
    assert weights <= set(model)
    assert model == {name: hub.repos[f"models/{MODEL}"][name] for name in model}
    assert not set(PICKLES) & set(model)
    assert not set(PICKLES) & set(hub.fetched())
    assert sorted(p.name for p in (tmp_path / "mirror").rglob(".*")) == [FETCHED] * 2


def test_what_is_there_is_not_fetched_again(run: Fetch, hub: Hub, tmp_path: Path) -> None:
    fine(run("fetch", *WORDS))
    before = content(tmp_path / "mirror")
    hub.requests.clear()
    told = fine(run("fetch", *WORDS))
    assert "is on this machine" in told
    assert hub.requests == []
    assert content(tmp_path / "mirror") == before


def test_one_repository_that_there_is_not_is_told_and_the_others_are_fetched(
    run: Fetch, hub: Hub, tmp_path: Path
) -> None:
    del hub.repos[f"datasets/{DATA}"]
    done = run("fetch", *WORDS)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "not fetched: " in done.stderr
    assert "404" in done.stderr or "not found" in done.stderr.lower()
    assert "the same command fetches what is missing" in done.stderr
    assert "1 of 2 fetched into mirror" in done.stdout
    assert (tmp_path / "mirror" / MODEL / "model.safetensors").is_file()
    assert not (tmp_path / "mirror" / f"{DATA}@v0").exists()


def test_a_hub_that_cannot_be_reached_is_told_without_a_traceback(run: Fetch, tmp_path: Path) -> None:
    done = run("fetch", *WORDS, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("not fetched: ") == 2
    assert "0 of 2 fetched into mirror" in done.stdout
    assert not any((tmp_path / "mirror" / place).exists() for place in PLACES)


def test_a_download_that_broke_off_is_no_mirror_and_the_next_call_goes_on(run: Fetch, hub: Hub, tmp_path: Path) -> None:
    hub.broken = {"data/train.jsonl"}
    done = run("fetch", *WORDS, HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "mirror" / f"{DATA}@v0").exists()
    hub.broken = set()
    hub.requests.clear()
    fine(run("fetch", *WORDS))
    assert "data/train.jsonl" in hub.fetched()
    assert "model.safetensors" not in hub.fetched()
    found = content(tmp_path / "mirror" / PLACES[0])
    del found[FETCHED]
    assert found == hub.repos[f"datasets/{DATA}"]


def test_of_a_download_that_broke_off_no_file_of_an_older_commit_stays(run: Fetch, hub: Hub, tmp_path: Path) -> None:
    name = f"datasets/{DATA}"
    hub.broken = {"data/train.jsonl"}
    assert run("fetch", *WORDS, HF_HUB_DOWNLOAD_TIMEOUT="2").returncode == 1
    hub.broken = set()
    hub.repos[name]["data/validation.jsonl"] = hub.repos[name].pop("data/test.jsonl")
    fine(run("fetch", *WORDS))
    found = content(tmp_path / "mirror" / PLACES[0])
    assert json.loads(found.pop(FETCHED))["commit"] == hub.commit(name)
    assert found == hub.repos[name]


def test_plan_and_sweep_read_what_was_fetched_with_the_hub_switched_off(run: Fetch, hub: Hub, tmp_path: Path) -> None:
    fine(run("fetch", *WORDS))
    hub.requests.clear()
    off = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    planned = json.loads(fine(run("plan", *WORDS, "--json", **off)))
    assert (planned["from_hub"], planned["not_ready"], planned["to_do"]) == ({}, [], 2)
    fine(run("sweep", *WORDS, "launcher=debug", **off))
    assert hub.requests == []
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "outputs/runs").glob("*/train.json"))
    inputs = record["inputs"]
    assert {name: inputs[name]["name"] for name in ("data", "model")} == {"data": DATA, "model": MODEL}
    assert json.loads(fine(run("plan", *WORDS, "--json", **off)))["to_do"] == 0
    # the record says which commits were read
    assert inputs["data"]["commit"] == hub.commit(f"datasets/{DATA}")
    assert inputs["model"]["commit"] == hub.commit(f"models/{MODEL}")


def test_a_model_that_the_mirror_lacks_is_named_before_a_sweep_starts(run: Fetch, tmp_path: Path) -> None:
    fine(run("fetch", *WORDS))
    shutil.rmtree(tmp_path / "mirror" / MODEL)
    done = run("sweep", *WORDS, "launcher=debug", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert f"the model {MODEL} is neither in the mirror nor in the hub's cache" in done.stderr
    assert "python -m peft_align.fetch" in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "env", "told"),
    [
        (WORDS[:-1], {}, "hub.mirror: is not set"),
        (WORDS, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE: is set: the hub is switched off"),
        (("model=tinny", "hub.mirror=mirror"), {}, "did you mean 'tiny'?"),
    ],
    ids=["no mirror", "hub switched off", "misspelled"],
)
def test_what_cannot_be_fetched_is_one_fault_and_nothing_is_made(
    run: Fetch, hub: Hub, tmp_path: Path, words: tuple[str, ...], env: dict[str, str], told: str
) -> None:
    done = run("fetch", *words, **env)
    assert done.returncode == 2
    assert told in done.stderr
    assert "1 fault in the input" in done.stderr
    assert hub.requests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../../../escaped.json", "/escaped.json", "a/../../../../escaped.json"])
def test_a_hub_that_names_files_outside_of_the_mirror_writes_none_there(
    run: Fetch, hub: Hub, tmp_path: Path, path: str
) -> None:
    hub.repos[f"models/{MODEL}"] |= {path: b"{}"}
    done = run("fetch", *WORDS)
    assert f"model {MODEL}" in done.stdout, "it was tried"
    allowed = tmp_path / "mirror" / MODEL
    assert not [found for found in tmp_path.rglob("*escaped*") if not found.is_relative_to(allowed)]
    assert not Path("/escaped.json").exists()


@pytest.mark.parametrize(
    "word",
    ["dataset.revision=../../../escaped", "model.hub_id=../../escaped", "model.hub_id=Org/..", "model.revision=/tmp/x"],
)
def test_names_that_lead_out_of_the_mirror_are_not_fetched(run: Fetch, hub: Hub, tmp_path: Path, word: str) -> None:
    done = run("fetch", *WORDS, word)
    assert done.returncode != 0
    assert "no branch" in done.stderr or "no repository" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*escaped*"))
