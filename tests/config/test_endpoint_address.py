"""Where a judge's questions and its key may go."""

from __future__ import annotations

import pytest
from judge_server import endpoint
from sweeping import expand, faults

from peft_align.config.judges import is_this_machine, sent_in_the_clear

TINY = ("model=tiny", "dataset=everyday", "judge=endpoint")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.10", "[::1]"])
def test_this_machine_needs_no_encryption(host: str) -> None:
    for url in (f"http://{host}/v1", f"http://{host}:8000/v1"):
        assert is_this_machine(url)
        assert sent_in_the_clear(endpoint(url, api_key_env="MY_KEY")) is None


@pytest.mark.parametrize(
    "host",
    [
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.5",
        "0.0.0.0",
        "[::2]",
        "[::ffff:10.0.0.5]",
        "2130706433",
        "node7",
    ],
)
def test_a_key_goes_to_no_other_machine_unencrypted(host: str) -> None:
    url = f"http://{host}:8000/v1"
    assert not is_this_machine(url)
    for allowed in (False, True):
        assert "the key" in str(sent_in_the_clear(endpoint(url, api_key_env="MY_KEY", plain_http=allowed)))
    assert "texts" in str(sent_in_the_clear(endpoint(url)))
    assert sent_in_the_clear(endpoint(url, plain_http=True)) is None
    assert sent_in_the_clear(endpoint(f"https://{host}/v1", api_key_env="MY_KEY")) is None


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/v1",
        "//host/v1",
        "http://",
        "http:///v1",
        "http://localhost\\@evil/v1",
        "http://a b/v1",
        "http://localhost#@evil/v1",
        "http://localhost?@evil/v1",
        "http://[::1]evil/v1",
        "http://localhost:80:90/v1",
        "https://host/v1?key=abcdefgh",
        "https://host/v1#x",
        "HTTP://host/v1",
        "https://hоst/v1",
    ],
)
def test_what_two_programs_could_read_as_two_addresses_is_none(url: str) -> None:
    quoted = url.replace("\\", "\\\\")
    (fault,) = faults(*TINY, f"judge.base_url='{quoted}'")
    assert fault.startswith(("judge.base_url: is no address of an API", "judge.base_url: holds a name or password"))


@pytest.mark.parametrize(
    "url", ["https://api.openai.com/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1", "https://h_1.x:443/a%20b/"]
)
def test_addresses_are_addresses(url: str) -> None:
    assert expand(*TINY, f"judge.base_url='{url}'").config.judge == endpoint(
        url, max_tokens=512, concurrency=16, timeout=300.0, retries=8
    )


def test_a_judge_that_nothing_is_judged_by_is_looked_at_too() -> None:
    key = "Ab0-a-key-by-mistake"
    (fault,) = faults(*TINY, "evaluation.benchmarks=[preference]", f"judge.api_key_env={key}")
    assert key not in fault
