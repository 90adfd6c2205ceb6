"""Keys and passwords are found where they do not belong, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeping import shipped

from peft_align import secrecy
from peft_align.config import validate
from peft_align.config.compose import config_dir, read_yaml
from peft_align.secrecy import of_environment, redacted, secret_in

KEY = "Wq7-not-of-any-known-form"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MY_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"{KEY}-{name}")
    monkeypatch.setenv("OTHER_TOKEN_PATH", "/home/me/.token")
    monkeypatch.setenv("SMALL_SECRET", "true")
    monkeypatch.setenv("KEYBOARD", "querty-keyboard")
    of_environment.cache_clear()
    yield
    of_environment.cache_clear()


SECRETS = {
    "a password in an address": "https://me:hunter2@host/v1",
    "a name in an address": "git+https://ghs1234@github.com/a/b",
    "the value of a variable": f"before {KEY}-MY_API_KEY after",
    "OpenAI's": "sk-proj-Ab3dEf6hIj9kLmN0pQrS",
    "Hugging Face's": "hf_" + "aB3" * 11,
    "GitHub's": "ghp_" + "aB3" * 12,
    "AWS's": "AKIAIOSFODNN7EXAMPLE",
    "of a header": "Bearer abcdef0123456789",
}


@pytest.mark.parametrize("text", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_found_and_not_told(text: str) -> None:
    told = secret_in(text)
    assert told
    assert not any(part in told for part in text.split() if len(part) > 6), "in words alone"
    assert "***" in redacted(text)
    for part in ("hunter2", "ghs1234", KEY, "Ab3dEf", "aB3aB3", "AKIAIO", "abcdef0123"):
        assert part not in redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://api.openai.com/v1",
        "http://x/@handle",
        "git@github.com:a/b.git",
        "me@host",
        "mistralai/Mistral-7B-v0.1",
        "sk-learn-linear-classifier-two",
        "hf_internal_testing/tiny",
        "0123456789abcdef0123456789abcdef01234567",
        "max_tokens=64",
        "judge.token_parameter=max_completion_tokens",
        "judge.api_key_env: is missing",
        "true",
        "the padding token: <pad>",
        "/home/me/.token",
        "querty-keyboard",
        "the bearer of this",
        "task-AbCdEf0123456789abcdef",
    ],
)
def test_what_is_no_secret_is_left_as_it_is(text: str) -> None:
    assert secret_in(text) is None
    assert redacted(text) == text


@pytest.mark.parametrize(
    "given", ["api_key=abc", "judge.x.token=abc", '{"password": "abc"}', "'Authorization': 'Basic abc'"]
)
def test_what_a_message_gives_for_a_key_is_hidden(given: str) -> None:
    assert "***" in redacted(given)
    assert redacted(redacted(given)) == redacted(given)


@given(st.text())
def test_any_text_is_redacted_to_one_that_holds_no_secret(text: str) -> None:
    assert secret_in(redacted(f"{text} sk-proj-Ab3dEf6hIj9kLmN0pQrS https://me:hunter2@host")) is None


def test_no_shipped_setting_is_taken_for_a_secret() -> None:
    for path in config_dir().rglob("*.yaml"):
        assert secret_in(str(read_yaml(path))) is None, path
    assert all(secret_in(leaf.rule.doc) is None for leaf in validate.leaves().values())
    assert shipped().options("judge"), "something was looked at"


def test_the_longer_of_two_values_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "abcdefgh-and-more")
    secrecy.of_environment.cache_clear()
    assert redacted("x abcdefgh-and-more y") == "x *** y"
