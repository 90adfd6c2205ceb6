"""The report in a browser: who is answered, what is given out, and that it follows what is on the disk."""

from __future__ import annotations

import base64
import hashlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from peft_align.errors import InputError, WorkError
from peft_align.reporting.serving import Refresher, listening, page, version
from peft_align.reporting.subject import state_of

Answer = tuple[int, dict[str, str], str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "sweeps/main"
    (found / "tables").mkdir(parents=True)
    (found / "findings.md").write_text("DPO <script>alert(1)</script> wins", encoding="utf-8")
    (found / "results.csv").write_text("a,b\n", encoding="utf-8")
    (found / "tables/table2.tex").write_text("a table", encoding="utf-8")
    (found / "sweep.json").write_text("{}", encoding="utf-8")
    (found / "figures.svg").write_text("<svg/>", encoding="utf-8")
    (tmp_path / "secret.csv").write_text("not for you", encoding="utf-8")
    (tmp_path / "sweeps/mains.csv").write_text("not for you", encoding="utf-8")
    (found / "link.csv").symlink_to(tmp_path / "secret.csv")
    (found / "up").symlink_to(tmp_path)
    return found


@pytest.fixture
def server(folder: Path) -> Iterator[ThreadingHTTPServer]:
    with listening(folder, 0) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: ThreadingHTTPServer, path: str, method: str = "GET", host: str | None = None) -> Answer:
    """One request with exactly this path: nothing of it is made plain before it is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return found


def test_the_texts_stand_escaped_where_there_is_no_page_yet(server: ThreadingHTTPServer) -> None:
    status, headers, text = ask(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "DPO &lt;script&gt;alert(1)&lt;/script&gt; wins" in text


def test_the_page_is_shown_with_a_script_that_the_file_does_not_have(server: ThreadingHTTPServer, folder: Path) -> None:
    whole = "<!doctype html><body>the page</body></html>"
    (folder / "report.html").write_text(whole, encoding="utf-8")
    for path in ("/", "/report.html"):
        _, _, text = ask(server, path)
        assert text.startswith("<!doctype html><body>the page<script>")
        assert f'"{version(folder)}"' in text
    assert (folder / "report.html").read_text(encoding="utf-8") == whole


def test_the_policy_of_the_page_lets_the_added_script_run_and_ask_this_server_alone(
    server: ThreadingHTTPServer, folder: Path
) -> None:
    policy = "default-src 'none'; script-src 'sha256-own'; base-uri 'none'"
    meta = '<meta http-equiv="Content-Security-Policy" content="{}">'
    (folder / "report.html").write_text(f"{meta.format(policy)}<body>{meta.format(policy)}</body>", encoding="utf-8")
    _, _, text = ask(server, "/")
    code = text.partition("<script>")[2].partition("</script>")[0]
    mark = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    wider = f"default-src 'none'; connect-src 'self'; script-src 'sha256-{mark}' 'sha256-own'; base-uri 'none'"
    assert text.startswith(f"{meta.format(wider)}<body>{meta.format(policy)}<script>")


@pytest.mark.parametrize("host", ["evil.example:PORT", "127.0.0.1", "127.0.0.1:1", "localhost", "127.0.0.1:PORT.evil"])
def test_a_name_that_others_had_point_here_is_not_answered(server: ThreadingHTTPServer, host: str) -> None:
    status, _, text = ask(server, "/", host=host.replace("PORT", str(server.server_port)))
    assert (status, text) == (403, "this host is not served\n")
    assert ask(server, "/", host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/../../secret.csv", "/%2e%2e/%2e%2e/secret.csv", "/..%2f..%2fsecret.csv", "/tables/../../../secret.csv"),
        *("/link.csv", "/up/secret.csv", "/../mains.csv", "//secret.csv", "/%2fetc%2fhosts.csv", "/%00.csv"),
        *("/sweep.json", "/tables", "/tables/", "/tables/none.tex", "/%ff.csv", "/..%5csecret.csv"),
    ],
)
def test_nothing_but_the_files_of_the_report_is_given_out(server: ThreadingHTTPServer, path: str) -> None:
    status, _, text = ask(server, path)
    assert (status, text) == (404, "there is no such file\n")


def test_its_files_are_given_out_with_headers_that_keep_them_harmless(server: ThreadingHTTPServer) -> None:
    for path, kind in (("/results.csv", "text/plain; charset=utf-8"), ("/tables/table2.tex?a=b", None), ("/", None)):
        status, headers, _ = ask(server, path)
        assert status == 200
        assert kind in (None, headers["Content-Type"])
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "sandbox" in ask(server, "/figures.svg")[1]["Content-Security-Policy"]


def test_nothing_can_be_sent_to_it(server: ThreadingHTTPServer) -> None:
    assert ask(server, "/results.csv", "HEAD")[::2] == (200, "")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        status, headers, _ = ask(server, "/", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_the_version_is_another_once_the_page_is_written_again(server: ThreadingHTTPServer, folder: Path) -> None:
    first = ask(server, "/version")[2]
    assert ask(server, "/version")[2] == first != ""
    (folder / "new.md").write_text("again", encoding="utf-8")
    (folder / "new.md").replace(folder / "findings.md")
    assert ask(server, "/version")[2] != first
    assert "again" in page(folder).decode()


@dataclass
class Runs:
    """Runs of a root; the report of them is the number of times that it was asked for."""

    root: Path
    read: int = 0
    failing: Exception | None = None

    def subject(self) -> Any:
        self.read += 1
        if self.failing:
            raise self.failing
        return self.read

    def state(self) -> str:
        return state_of([(self.root, ["a", "b"])])


def test_the_report_is_written_again_when_a_record_changed_and_not_otherwise(tmp_path: Path) -> None:
    evaluation = tmp_path / "runs/a/evaluations/mmlu-1/judgements/gpt4"
    evaluation.mkdir(parents=True)
    runs, written = Runs(tmp_path), list[Any]()
    refresher = Refresher(runs, written.append, 1.0)
    changes: list[tuple[str, bool]] = [
        ("runs/a/progress.json", False),
        ("runs/a/train.json", True),
        ("runs/b/failed.json", False),
        ("runs/a/evaluations/mmlu-1/record.json", True),
        ("runs/a/evaluations/mmlu-1/judgements/gpt4/record.json", True),
        ("runs/c/train.json", False),
    ]
    assert (refresher.look(), refresher.look()) == (True, False)
    (tmp_path / "runs/b").mkdir()
    changes[2] = ("runs/b/failed.json", True)
    (tmp_path / "runs/c").mkdir()
    for name, seen in changes:
        (tmp_path / name).write_text("{}", encoding="utf-8")
        assert (refresher.look(), refresher.look()) == (seen, False), name
    assert written == list(range(1, 6))


@pytest.mark.parametrize("fault", [OSError("the disk is full"), WorkError("the disk is full")])
def test_a_report_that_cannot_be_written_is_told_once_and_tried_again(
    fault: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path, failing=fault)
    refresher = Refresher(runs, lambda subject: None, 0.001)
    wait: Callable[[float | None], bool] = refresher.ended.wait
    looks = iter([False, False, False, True])
    refresher.ended.wait = lambda timeout=None: next(looks)  # type: ignore[method-assign]
    refresher.run()
    assert runs.read == 3
    assert capsys.readouterr().err == "the report was not written again: the disk is full\n"
    assert not wait(0)


def test_a_port_in_use_is_bad_input(server: ThreadingHTTPServer, folder: Path) -> None:
    with pytest.raises(InputError, match="Address already in use"):
        listening(folder, server.server_port)
