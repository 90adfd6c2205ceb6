"""The judges: whatever scores generated text. Their scientific fields are a judge's id, which is part of the key."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from peft_align.config.fields import operational, value


@dataclass(frozen=True)
class NoJudge:
    kind: str = value("nothing is judged by a model: texts are generated, and can be judged later", choices=("none",))


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind an OpenAI-compatible API: a provider's, or your own server's."""

    kind: str = value("an OpenAI-compatible API", choices=("openai",))
    model: str = value("the model's name at the API")
    version: str | None = value("tells apart two models that go by one name, e.g. the hash of a fine-tune")
    temperature: float | None = value("0 is greedy; null: the API's default, for models that take no other", low=0)
    max_tokens: int = value("longest answer", low=1)
    token_parameter: str = operational("what the API calls that", choices=("max_tokens", "max_completion_tokens"))
    base_url: str = operational(
        "where /chat/completions is, e.g. http://localhost:8000/v1",
        form=(
            r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?(/[\w.~%:/-]*)?",
            "is no address of an API",
            "write http(s)://HOST[:PORT]/v1, without a name or key in it",
        ),
    )
    api_key_env: str | None = operational(
        "environment variable that holds the key; null: none is sent",
        form=(
            "[A-Z_][A-Z0-9_]{0,63}",
            "is no name of an environment variable in capitals",
            "give the variable's name, not the key itself",
        ),
    )
    concurrency: int = operational("questions under way at a time", low=1)
    requests_per_minute: float | None = operational("most requests sent in a minute; null: no limit", above=0)
    timeout: float = operational("seconds to wait for an answer", above=0)
    retries: int = operational("times a question is asked again after a failure of the network or the API", low=0)
    price_per_million_input: float | None = operational("in your currency, for the cost told; null: unknown", low=0)
    price_per_million_output: float | None = operational("likewise for the answers", low=0)
    plain_http: bool = operational(
        "send texts, and never a key, over http:// to a host that is not this machine", default=False
    )


@dataclass(frozen=True)
class LocalLM:
    """A chat model that this machine runs."""

    kind: str = value("a causal language model with a chat template", choices=("causal_lm",))
    hub_id: str = value("repository on the hub, or a folder")
    revision: str | None = value("branch, tag or commit; null is unpinned")
    precision: str = value("of its weights", choices=("bf16", "fp32", "nf4"))
    max_tokens: int = value("longest answer", low=1)
    batch_size: int = operational("questions per forward pass", low=1)


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier that scores a text: nicholasKluge/ToxicityModel, or any other of transformers."""

    kind: str = value("a sequence classifier", choices=("classifier",))
    hub_id: str = value("repository on the hub, or a folder")
    revision: str | None = value("branch, tag or commit; null is unpinned")
    label: str | None = value("the label whose probability is the score; null: it has one logit, which is the score")
    higher_is_better: bool = value("whether a higher score is a better, less toxic text")
    max_length: int = value("tokens; a longer text loses its end", low=8)
    precision: str = value("of its weights", choices=("bf16", "fp32"))
    batch_size: int = operational("texts per forward pass", low=1)


@dataclass(frozen=True)
class Profanity:
    """The linear classifier of the wheel alt-profanity-check: small, offline, and cruder than a reward model."""

    kind: str = value("the scorer of the wheel alt-profanity-check", choices=("profanity",))


JUDGES: dict[str, type] = {
    "none": NoJudge,
    "openai": Endpoint,
    "causal_lm": LocalLM,
    "classifier": Classifier,
    "profanity": Profanity,
}


def is_this_machine(base_url: str) -> bool:
    """Whether an address is one that never leaves this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def sent_in_the_clear(judge: Endpoint) -> str | None:
    """What may not be sent to an endpoint as it is, for everybody on the way could read it; None: nothing."""
    if judge.base_url.startswith("https://") or is_this_machine(judge.base_url):
        return None
    if judge.api_key_env:
        return "the key would be sent unencrypted to another machine"
    return None if judge.plain_http else "texts would be sent unencrypted to another machine"


Judge = NoJudge | Endpoint | LocalLM | Classifier | Profanity


def judge_label(option: str, judge: Judge) -> str:
    """How tables name a judge: its option and the model behind it."""
    if isinstance(judge, Endpoint):
        return f"{option}/{judge.model}"
    if isinstance(judge, (LocalLM, Classifier)):
        return f"{option}/{judge.hub_id.rstrip('/').rpartition('/')[2]}"
    return option


# What answers questions in words, and what scores texts.
ANSWERING = ("openai", "causal_lm")
SCORING = ("classifier", "profanity")
