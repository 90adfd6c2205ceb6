"""Keys and passwords: found where they do not belong, and taken out of what people are told."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SECRETS_BELONG = "keys belong into environment variables: judge.api_key_env names one"
SHORTEST = 8  # characters; a shorter value of a variable may be a word like "true"
NAMES_A_SECRET = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
IN_A_URL = re.compile(r"(?<=://)(?!\*\*\*@)[^/\s@'\"]+(?=@)")  # the name and password of scheme://name:password@host
# Keys by their form: OpenAI's and those made like them, Hugging Face's, GitHub's, AWS's; and what stands in a header.
FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[a-z]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{30,}|AKIA[A-Z0-9]{16}(?![A-Z0-9])|Bearer\s+(?=[\w.~+/=-]*\d)[\w.~+/=-]{8,})"
)
# `api_key=VALUE` and `'token': 'VALUE'`, whatever stands before the word; `max_tokens=64` is none.
GIVEN = re.compile(
    r"((?:api_?key|token|secret|password|passwd|authorization)(?:=|['\"]\s*[:=]\s*)['\"]?)(?!\*)[^\s'\",;}]+",
    re.IGNORECASE,
)


def secret_in(text: str) -> str | None:
    """What a text holds that must not be kept: in words, without the secret itself; None if it holds nothing such."""
    if IN_A_URL.search(text):
        return "a name or password in an address"
    for name, value in of_environment().items():
        if value in text:
            return f"the value of ${name}"
    return "what looks like a key" if FORMS.search(text) else None


def redacted(text: str) -> str:
    """The text with *** in the place of every secret that is known, or looks like one."""
    for value in of_environment().values():
        text = text.replace(value, HIDDEN)
    return GIVEN.sub(rf"\g<1>{HIDDEN}", FORMS.sub(HIDDEN, IN_A_URL.sub(HIDDEN, text)))


@functools.cache
def of_environment() -> Mapping[str, str]:
    """The variables whose names say that they hold a secret, longest values first; a path is none."""
    found = {
        name: value.strip()
        for name, value in os.environ.items()
        if NAMES_A_SECRET.search(name) and len(value.strip()) >= SHORTEST and not os.path.isabs(value)
    }
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))
