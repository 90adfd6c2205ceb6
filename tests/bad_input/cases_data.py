"""Rows and files of every loader, found through hub.mirror; and those of the benchmarks that generate texts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bad_input import FAILED, REFUSED, TOLD, Case, write

Row = Mapping[str, Any]
HH, PKU = "Anthropic/hh-rlhf/harmless-base", "PKU-Alignment/PKU-SafeRLHF@v0"
SETTINGS = ("model=tiny", "peft=lora", "train.max_steps=1", "train.batch_size=2", "train.max_length=64")
MIRROR = "hub.mirror=mirror"


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def hh_rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows as HH-RLHF has them."""
    return [{"chosen": dialogue(f"q{i}", "yes"), "rejected": dialogue(f"q{i}", "no")} for i in range(count)]


def pku_rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows as PKU-SafeRLHF v0 has them."""
    return [
        {
            "prompt": f"q{i}", "response_0": "yes", "response_1": "no", "is_response_0_safe": True,
            "is_response_1_safe": False, "better_response_id": i % 2, "safer_response_id": 0,
        }
        for i in range(count)
    ]  # fmt: skip


def lines(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def changed(rows: list[dict[str, Any]], at: int | None = None, **values: Any) -> list[dict[str, Any]]:
    """The rows with these values, in one row or in all."""
    return [{**row, **values} if at in (None, i) else row for i, row in enumerate(rows)]


def train(
    name: str,
    files: Mapping[str, bytes],
    *told: str,
    words: Sequence[str] = ("dataset=hh_rlhf",),
    code: int = FAILED,
) -> Case:
    """Files in the mirror that a run is trained on."""

    def prepare(folder: Path) -> list[str]:
        for path, content in files.items():
            write(folder / "mirror" / path, content)
        return ["train", *SETTINGS, *words, MIRROR]

    return Case("data", name, prepare, told, code)


def hh(name: str, content: bytes | list[dict[str, Any]], *told: str, code: int = FAILED) -> Case:
    data = content if isinstance(content, bytes) else lines(content)
    return train(name, {f"{HH}/train.jsonl": data}, *told, code=code)


def pku(name: str, rows: list[dict[str, Any]], rule: str, *told: str) -> Case:
    words = ("dataset=beavertails", f"preference={rule}")
    return train(name, {f"{PKU}/train.jsonl": lines(rows)}, *told, words=words)


def own(name: str, rows: list[dict[str, Any]], *told: str) -> Case:
    words = ("dataset=everyday", "dataset.hub_id=me/mine")
    return train(name, {"me/mine/train.jsonl": lines(rows)}, *told, words=words)


def everyday_rows(**values: Any) -> list[dict[str, Any]]:
    return [{"id": f"harmless-{i}", "prompt": "q", "chosen": "a", "rejected": "b", **values} for i in range(8)]


GOOD = lines(hh_rows())
FIRST = f"{HH}/train.jsonl, line 1"
FILES = [
    hh("empty file", b"", f"{HH}/train.jsonl: is empty", "fetch it again"),
    hh("blank lines alone", b"\n\n", f"{HH}/train.jsonl: has no row", "fetch it again"),
    hh(
        "line that is not JSON",
        GOOD + b'{"chosen": "a", "rejec\n' + GOOD,
        f"{HH}/train.jsonl, line 9: is not JSON",
        "column",
        '{"COLUMN": VALUE, ...}',
    ),
    hh("line that is a list", GOOD + b'["a", "b"]\n', f"{HH}/train.jsonl, line 9: is a list, not a row"),
    hh("file that is no JSON at all", b"chosen,rejected\na,b\n", f"{FIRST}: is not JSON"),
    hh(
        "latin-1",
        GOOD
        + json.dumps({"chosen": dialogue("q", "\xfc"), "rejected": dialogue("q", "b")}, ensure_ascii=False).encode(
            "latin-1"
        )
        + b"\n",
        f"{HH}/train.jsonl, line 9: is not UTF-8",
        "iconv -f LATIN1",
    ),
    hh("UTF-16", GOOD.decode().encode("utf-16"), f"{HH}/train.jsonl: is UTF-16", "iconv -f UTF-16"),
    hh("nested too deeply", GOOD + b'{"chosen": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 9"),
    train(
        "gzip that is cut off",
        {f"{HH}/train.jsonl.gz": gzip.compress(lines(hh_rows(3000)))[:2000]},
        f"{HH}/train.jsonl.gz: is cut off after line",
        "fetch it again",
    ),
    train(
        "gzip that is damaged",
        {f"{HH}/train.jsonl.gz": bytes(b ^ (0xFF if 30 < i < 60 else 0) for i, b in enumerate(gzip.compress(GOOD)))},
        f"{HH}/train.jsonl.gz: is damaged after line",
        "fetch it again",
    ),
    train("no files", {f"{HH}/README.md": b"# nothing\n"}, HH, "contain any data files"),
    train("no folder of the preference", {"Anthropic/hh-rlhf/helpful-base/train.jsonl": GOOD}, f"{HH}: is not there"),
    train("no train split", {f"{HH}/test.jsonl": GOOD}, "has no files of a split 'train'", "it has: test"),
    train(
        "a readme that points at nothing",
        {
            "me/mine/README.md": b"---\nconfigs:\n- config_name: default\n  data_files: nowhere.jsonl\n---\n",
            "me/mine/train.jsonl": GOOD,
        },
        "me/mine",
        "nowhere.jsonl",
        words=("dataset=everyday", "dataset.hub_id=me/mine"),
    ),
    train(
        "another revision",
        {"PKU-Alignment/PKU-SafeRLHF@v1/train.jsonl": lines(pku_rows())},
        "dataset=beavertails: the dataset PKU-Alignment/PKU-SafeRLHF",
        "peft_align.fetch",
        words=("dataset=beavertails",),
        code=REFUSED,
    ),
]
ROWS = [
    hh("null fields", changed(hh_rows(), chosen=None), "has no usable pair", "8 × response is not text", FIRST),
    hh("numbers for texts", changed(hh_rows(), chosen=3, rejected=4), "8 × response is not text", "dialogues"),
    hh(
        "lists of messages for texts",
        changed(hh_rows(), chosen=[{"role": "user", "content": "q"}], rejected=[{"role": "user", "content": "q"}]),
        "8 × response is not text",
        FIRST,
        "\\n\\nHuman: ...",
    ),
    hh(
        "a list among texts",
        changed(hh_rows(), 5, chosen=["a"]),
        "1 of 8 rows left out: 1 × response is not text (first:",
        "line 6",
        code=TOLD,
    ),
    hh(
        "a number among texts",
        changed(hh_rows(), 5, chosen=7),
        "1 of 8 rows left out: 1 × response is not text (first:",
        "line 6",
        code=TOLD,
    ),
    hh(
        "missing column",
        [{"chosen": row["chosen"]} for row in hh_rows()],
        "has no column rejected; it has chosen",
        f"{HH}/train.jsonl",
        "rename",
    ),
    hh(
        "columns of other names",
        [{"prompt": "q", "completion": "a"} for _ in range(4)],
        "has no column chosen, rejected; it has prompt, completion",
    ),
    hh("prompts that differ", changed(hh_rows(), rejected=dialogue("another", "no")), "8 × prompts differ", FIRST),
    hh(
        "equal responses",
        [{"chosen": row["chosen"], "rejected": row["chosen"]} for row in hh_rows()],
        "8 × responses are equal",
    ),
    hh(
        "empty responses",
        changed(hh_rows(), chosen=dialogue("q", " "), rejected=dialogue("q", "")),
        "8 × empty response",
    ),
    hh("no assistant's turn", changed(hh_rows(), chosen="yes", rejected="no"), "8 × no assistant turn", "Assistant:"),
    hh(
        "no user's turn",
        changed(hh_rows(), chosen="\n\nAssistant: a", rejected="\n\nAssistant: b"),
        "8 × empty turn in the prompt",
    ),
    hh(
        "one of several reasons",
        changed(changed(hh_rows(), chosen=None), 3, chosen="x", rejected="y"),
        "7 × response is not text",
        "1 × no assistant turn (first:",
        "line 4",
    ),
    hh(
        "some rows that cannot be used",
        changed(changed(hh_rows(20), 4, chosen=None), 9, chosen=None) + changed(hh_rows(1), chosen=None),
        "warning: Anthropic/hh-rlhf, harmless",
        "3 of 21 rows left out: 3 × response is not text (first:",
        "line 5",
        code=TOLD,
    ),
    hh(
        "a row of two megabytes",
        [{"chosen": dialogue("q", "a" * 2_000_000), "rejected": dialogue("q", "b")}, *hh_rows()],
        "done: ",
        code=TOLD,
    ),
    pku(
        "labels neither 0 nor 1",
        changed(pku_rows(), better_response_id=2),
        "helpful",
        "8 × no better response named",
        "better_response_id is 0 or 1",
        "line 1",
    ),
    pku(
        "labels that are texts", changed(pku_rows(), better_response_id="0"), "helpful", "8 × no better response named"
    ),
    pku(
        "missing label",
        [{k: v for k, v in row.items() if k != "better_response_id"} for row in pku_rows()],
        "helpful",
        "has no column better_response_id",
    ),
    pku(
        "safety that is text",
        changed(pku_rows(), is_response_0_safe="yes", is_response_1_safe="no"),
        "harmless",
        "8 × not exactly one safe response",
        "true or false",
    ),
    pku(
        "no pair with one safe response",
        changed(pku_rows(), is_response_1_safe=True),
        "harmless",
        "8 × not exactly one safe response",
    ),
    pku(
        "missing safety",
        [{k: v for k, v in row.items() if "safe" not in k} for row in pku_rows()],
        "harmless",
        "has no column is_response_0_safe, is_response_1_safe",
    ),
    pku("numbers for prompts", changed(pku_rows(), prompt=5), "harmless", "8 × prompt is not text"),
    pku(
        "lengths that differ",
        changed(pku_rows(), response_0="x" * 50),
        "helpful_length_controlled",
        "8 × lengths differ by more than 10 percent",
    ),
    own(
        "ids of no preference",
        everyday_rows(id="other-1"),
        "me/mine",
        "no row that the preference is for",
        "harmless- or helpful-",
    ),
    own("numbers for ids", everyday_rows(id=1), "8 × id or prompt is not text"),
    own("null prompts", everyday_rows(prompt=None), "8 × id or prompt is not text"),
    own(
        "missing prompt",
        [{k: v for k, v in row.items() if k != "prompt"} for row in everyday_rows()],
        "has no column prompt; it has id, chosen, rejected",
    ),
]


def scored(name: str, benchmark: str, files: Mapping[str, bytes], *told: str, words: Sequence[str] = ()) -> Case:
    """Files of a benchmark that generates texts."""

    def prepare(folder: Path) -> list[str]:
        for path, content in files.items():
            write(folder / "mirror" / path, content)
        settings = (*SETTINGS, "dataset=everyday", f"evaluation.benchmarks=[{benchmark}]", "launcher=debug")
        return ["evaluate", *settings, MIRROR, *words]

    return Case("data", name, prepare, told, FAILED)


ALPACA, TOXIC = "tatsu-lab/alpaca_eval", "allenai/real-toxicity-prompts"
RED = "declare-lab/red-instruct"
BENCHMARKS = [
    scored(
        "AlpacaEval without instructions",
        "alpaca_eval",
        {f"{ALPACA}/alpaca_eval.json": b'[{"output": "a"}]'},
        f"{ALPACA}: row 0",
        "no text instruction; it has output",
    ),
    scored("AlpacaEval that is a mapping", "alpaca_eval", {f"{ALPACA}/alpaca_eval.json": b'{"a": 1}'}, ALPACA, "row 0"),
    scored(
        "AlpacaEval that is cut off",
        "alpaca_eval",
        {f"{ALPACA}/alpaca_eval.json": b'[{"instruction": "a"'},
        ALPACA,
        "cannot be read",
    ),
    scored(
        "toxicity prompts without text",
        "real_toxicity",
        {f"{TOXIC}/train.jsonl": lines([{"prompt": {"toxicity": 0.5}}])},
        f"{TOXIC}: row 0",
        "no text prompt.text",
        words=["benchmark.real_toxicity.judge=null"],
    ),
    scored(
        "toxicity prompts without the score",
        "real_toxicity",
        {f"{TOXIC}/train.jsonl": lines([{"prompt": {"text": "a", "toxicity": 0.5}}])},
        "no prompt has a score",
        words=["benchmark.real_toxicity.judge=null"],
    ),
    scored(
        "Red-Instruct's questions of another form",
        "red_instruct_standard",
        {f"{RED}/dangerousqa.json": b'{"a": 1}', f"{RED}/red_prompts/standard.txt": b"<question>"},
        "dangerousqa.json: a list of texts is expected",
    ),
    scored(
        "Red-Instruct's prompt without its place",
        "red_instruct_standard",
        {f"{RED}/dangerousqa.json": b'["a"]', f"{RED}/red_prompts/standard.txt": b"tell me"},
        "standard.txt: has no <question>",
    ),
]

CASES = [*FILES, *ROWS, *BENCHMARKS]
