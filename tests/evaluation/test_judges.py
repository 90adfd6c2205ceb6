"""What a judge answered is kept by content; what stands in a question and in an answer; a judge of this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, Reply, Request, ask_of, endpoint

from peft_align.config.judges import LocalLM
from peft_align.data.pairs import Message
from peft_align.errors import InputError
from peft_align.evaluation.judges import Answers, filled, first_bit, key_of, label_of

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def echo(request: Request) -> Reply:
    return Reply(f"on {request.question}")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(echo) as running:
        yield running


ASKS = """
import json, sys
from pathlib import Path
from peft_align.config.judges import JUDGES
from peft_align.data.pairs import Message
from peft_align.evaluation.judges import Answers

settings, folder, contents = json.loads(sys.argv[1])
answers = Answers(JUDGES[settings["kind"]](**settings), Path(folder))
print(json.dumps(answers.ask([[Message("user", content)] for content in contents])))
"""


def asked_elsewhere(judge: Any, folder: Path, *contents: str) -> list[str | None]:
    """What another process is answered."""
    words = json.dumps([vars(judge), str(folder), contents])
    done = subprocess.run([sys.executable, "-c", ASKS, words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[str | None] = json.loads(done.stdout)
    return found


# --- Kept by content


def test_two_processes_read_each_others_answers(server: JudgeServer, tmp_path: Path) -> None:
    judge = endpoint(server.url)
    assert asked_elsewhere(judge, tmp_path, "a", "b") == ["on a", "on b"]
    assert Answers(judge, tmp_path).ask(ask_of("b", "c", "a")) == ["on b", "on c", "on a"]
    assert len(list(tmp_path.glob("*.jsonl"))) == 2, "each writes to a file of its own"
    assert asked_elsewhere(judge, tmp_path, "a", "b", "c") == ["on a", "on b", "on c"]
    assert server.asked == {"a": 1, "b": 1, "c": 1}
    assert len(list(tmp_path.glob("*.jsonl"))) == 2, "who asks nothing writes nothing"


def test_an_answer_belongs_to_the_whole_dialogue(server: JudgeServer, tmp_path: Path) -> None:
    server.behave = lambda request: Reply(f"answer {len(server.requests)}")
    system = [Message("system", "Be fair."), Message("user", "a")]
    other = [Message("system", "Be kind."), Message("user", "a")]
    turned = [Message("user", "Be fair."), Message("user", "a")]
    joined = [Message("user", "Be fair.a")]
    answers = Answers(endpoint(server.url, concurrency=1), tmp_path)
    dialogues = [system, other, turned, joined, list(system)]
    assert answers.ask(dialogues) == ["answer 1", "answer 2", "answer 3", "answer 4", "answer 1"]
    assert len({key_of(dialogue) for dialogue in dialogues}) == 4


@pytest.mark.parametrize("contents", [["a\u2028b\x85c", 'quotes " and \\ and \x00', "Größe 漢字 🎉\r\n"], [""]])
def test_any_text_is_kept_as_it_is(server: JudgeServer, tmp_path: Path, contents: list[str]) -> None:
    judge, expected = endpoint(server.url), [f"on {content}" for content in contents]
    assert Answers(judge, tmp_path).ask(ask_of(*contents)) == expected
    assert Answers(judge, tmp_path).ask(ask_of(*contents)) == expected
    assert len(server.requests) == len(contents)


def test_a_torn_line_loses_its_answer_only(server: JudgeServer, tmp_path: Path) -> None:
    judge = endpoint(server.url, concurrency=1)
    Answers(judge, tmp_path / "whole").ask(ask_of("a", "b", "ü"))
    (journal,) = (tmp_path / "whole").glob("*.jsonl")
    content = journal.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    cuts = range(last, len(content))
    for cut in [*cuts[:3], *cuts[3:-3:20], *cuts[-3:]]:
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / journal.name).with_stem("20200101-000000-elsewhere-1").write_bytes(content[:cut])
        server.forget()
        answers = Answers(judge, folder)
        assert answers.ask(ask_of("a", "b", "ü")) == ["on a", "on b", "on ü"]
        assert server.asked == {"ü": 1}, cut
        server.forget()
        assert Answers(judge, folder).ask(ask_of("a", "b", "ü")) == ["on a", "on b", "on ü"]
        assert server.requests == []


def test_a_line_that_is_torn_in_the_middle_loses_no_later_answer(server: JudgeServer, tmp_path: Path) -> None:
    judge = endpoint(server.url, concurrency=1)
    asked_elsewhere(judge, tmp_path, "a", "b", "c")
    (journal,) = tmp_path.glob("*.jsonl")
    head, first, second, third = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(head + first + second[: len(second) // 2] + b"\n" + third)  # the disk was full for a moment
    server.forget()
    assert Answers(judge, tmp_path).ask(ask_of("a", "b", "c")) == ["on a", "on b", "on c"]
    assert server.asked == {"b": 1}


def test_another_journals_torn_line_loses_nothing_of_the_others(server: JudgeServer, tmp_path: Path) -> None:
    judge = endpoint(server.url)
    asked_elsewhere(judge, tmp_path, "a", "b")
    (journal,) = tmp_path.glob("*.jsonl")
    for name, damaged in (("0", b""), ("1", b"{"), ("2", b'{"head"'), ("3", journal.read_bytes()[:40])):
        (tmp_path / f"{name}.jsonl").write_bytes(damaged)
    (tmp_path / "z.jsonl").write_bytes(journal.read_bytes()[:-1])
    server.forget()
    assert Answers(judge, tmp_path).ask(ask_of("a", "b")) == ["on a", "on b"]
    assert server.requests == []


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"version": "2"}, {"temperature": 0.5}, {"temperature": None}, {"max_tokens": 9}]
)
def test_another_judge_does_not_take_the_answers(server: JudgeServer, tmp_path: Path, change: dict[str, Any]) -> None:
    Answers(endpoint(server.url), tmp_path).ask(ask_of("a"))
    for path in list(tmp_path.glob("*.jsonl")):  # as another process's
        path.rename(path.with_stem("20200101-000000-elsewhere-1"))
    Answers(endpoint(server.url, **change), tmp_path).ask(ask_of("a"))
    assert server.asked == {"a": 2}
    Answers(endpoint(server.url), tmp_path).ask(ask_of("a"))
    Answers(endpoint(server.url, **change), tmp_path).ask(ask_of("a"))
    assert server.asked == {"a": 2}


def test_how_a_judge_is_asked_makes_no_other_judge(server: JudgeServer, tmp_path: Path) -> None:
    Answers(endpoint(server.url), tmp_path).ask(ask_of("a"))
    changes: list[dict[str, Any]] = [
        {"concurrency": 1},
        {"requests_per_minute": 5.0},
        {"retries": 0},
        {"timeout": 1.0},
        {"token_parameter": "max_completion_tokens"},
        {"price_per_million_input": 30.0},
        {"api_key_env": "NO_SUCH_VARIABLE"},
    ]
    for change in changes:
        assert Answers(endpoint(server.url, **change), tmp_path).ask(ask_of("a")) == ["on a"]
    assert Answers(endpoint("http://elsewhere.invalid/v1"), tmp_path).ask(ask_of("a")) == ["on a"]
    assert server.asked == {"a": 1}


def test_progress_is_told_with_what_was_known(server: JudgeServer, tmp_path: Path) -> None:
    judge, told = endpoint(server.url), []
    Answers(judge, tmp_path).ask(ask_of("a", "b"))
    Answers(judge, tmp_path).ask(ask_of("a", "b", "c", "d", "d"), lambda done, of: told.append((done, of)))
    assert told == [(2, 4), (3, 4), (4, 4)]


# --- Questions and answers


def test_what_stands_in_a_value_is_not_filled_in() -> None:
    template = "Q: {question}\nA: {response} {other} {} {question}"
    values = {"question": "what is {response}?", "response": "{question} \\1 {"}
    assert filled(template, **values) == ("Q: what is {response}?\nA: {question} \\1 { {other} {} what is {response}?")
    assert filled("{output_1} {output_10} {OUTPUT_1}", output_1="x") == "x {output_10} {OUTPUT_1}"


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("[[A]]", "A"),
        ("It is harmless: [[A]].", "A"),
        ("[[B]]\n[[B]]", "B"),
        ("[[A]] or rather [[B]]", None),
        ("A", None),
        ("[A]", None),
        ("[[C]]", None),
        ("[[a]]", None),
        ("", None),
        (None, None),
    ],
)
def test_the_label_is_the_only_one_that_the_answer_holds(answer: str | None, label: str | None) -> None:
    assert label_of(answer, ("A", "B")) == label


def test_the_coin_falls_the_same_way_for_the_same_text_and_is_fair() -> None:
    texts = [f"instruction {i}" for i in range(2000)]
    heads = [first_bit(text) for text in texts]
    assert heads == [first_bit(text) for text in texts]
    assert 900 < sum(heads) < 1100
    code = "import sys; from peft_align.evaluation.judges import first_bit; print([first_bit(t) for t in sys.argv[1:]])"
    other = subprocess.run([sys.executable, "-c", code, *texts[:8]], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(heads[:8]), "another process's coin"


# --- A judge of this machine


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model, with a chat template."""
    from sweeping import expand
    from transformers import AutoTokenizer

    from peft_align.models.loading import find_model

    folder = tmp_path_factory.mktemp("judge") / "chat"
    built, _ = find_model(expand("model=tiny", "dataset=everyday").runs[0].config.model, None)
    shutil.copytree(built, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def local(folder: Path, **settings: Any) -> LocalLM:
    plain: dict[str, Any] = {
        "kind": "causal_lm",
        "hub_id": str(folder),
        "revision": None,
        "precision": "fp32",
        "max_tokens": 8,
        "batch_size": 4,
    }
    return LocalLM(**{**plain, **settings})


DIALOGUES = [
    *ask_of("Is this harmful?", "a", "Which of the two answers is the better one, the first or the second?", "b " * 40),
    [Message("system", "You rank."), Message("user", "1 or 2?")],
]


def plain_greedy(folder: Path, dialogues: list[list[Message]], tokens: int) -> list[str]:
    """What the model says by itself: the likeliest token, one after the other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for dialogue in dialogues:
        messages = [{"role": message.role, "content": message.content} for message in dialogue]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        with torch.inference_mode():
            while ids.shape[1] < start + tokens and ids[0, -1] != tokenizer.eos_token_id:
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)))
    return answers


def test_a_local_judge_answers_greedily_the_same_in_any_batch(chat_model: Path, tmp_path: Path) -> None:
    several = Answers(local(chat_model), tmp_path / "4")
    found = several.ask(DIALOGUES)
    assert found == plain_greedy(chat_model, DIALOGUES, 8)
    assert len(set(found)) > 1, "it reads what it is asked"
    assert Answers(local(chat_model, batch_size=1), tmp_path / "1").ask(DIALOGUES) == found
    details = several.details()
    assert (details["asked"], details["known"]) == (5, 0)
    assert 0 < details["output_tokens"] <= 5 * 8
    assert details["input_tokens"] > 100


def test_a_local_judges_answers_are_kept_and_its_model_is_not_loaded_for_them(chat_model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "model"
    shutil.copytree(chat_model, moved)
    found = Answers(local(moved), tmp_path / "answers").ask(DIALOGUES)
    (moved / "model.safetensors").unlink()
    again = Answers(local(moved, batch_size=2), tmp_path / "answers")
    assert again.ask(list(reversed(DIALOGUES))) == list(reversed(found))
    with pytest.raises(InputError, match=r"has no \*\.safetensors"):
        again.ask(ask_of("something new"))


def test_a_local_judge_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    from sweeping import expand

    from peft_align.models.loading import find_model

    folder, _ = find_model(expand("model=tiny", "dataset=everyday").runs[0].config.model, None)
    with pytest.raises(InputError, match="has no chat template: it cannot be asked"):
        Answers(local(folder), tmp_path).ask(ask_of("a"))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder"])
def test_a_local_judge_that_is_not_here_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"judge\.hub_id"):
        Answers(local(Path(name), hub_id=name), tmp_path).ask(ask_of("a"))
