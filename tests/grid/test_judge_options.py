"""Which judge scores what, what one benchmark's settings change, and what must be there before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file
from sweeping import (
    expand,
    faults,
    finish_evaluation,
    finish_judgement,
    finish_training,
    ids,
    metric,
    one_fault,
    plan,
    shipped,
    trained,
    write_option,
)

from peft_align import evaluate, sweep
from peft_align.cli import Asked
from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.errors import InputError
from peft_align.grid import needs
from peft_align.grid.planner import Item, Planner
from peft_align.grid.runs import Sweep
from peft_align.plan import describe

Grid = Callable[..., Sweep]

TINY = ("model=tiny", "dataset=everyday", "train.max_steps=4")
NO_ROOT = Path("nowhere")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are remembered in a folder of the test."""
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def asked(*names: str) -> str:
    return f"evaluation.benchmarks=[{','.join(names)}]"


def baseline(*words: str, root: Path = NO_ROOT, space: ConfigSpace | None = None) -> Item:
    """The state of the only baseline: its keys are known without any training."""
    (run,) = [run for run in expand(*TINY, *words, space=space).runs if run.kind == "baseline"]
    return Planner(root, None).item(run)


def asked_with(*words: str) -> Asked:
    """What `ask` gives, of the options that are composed already."""
    found = expand(*words)
    return Asked(parse(words), found, Planner(Path(found.config.root), found.config.hub.mirror))


def evaluation_key(*words: str) -> str:
    """The key of the only evaluation of the baseline."""
    (request,) = baseline(*words).requests
    assert request.key is not None
    return json.dumps(request.key, sort_keys=True)


def judgement_key(*words: str, space: ConfigSpace | None = None) -> str:
    """The key of the only judging of the baseline."""
    (judgement,) = baseline(*words, space=space).judgements
    return json.dumps(judgement.key, sort_keys=True)


def judged_by(*words: str, space: ConfigSpace | None = None) -> dict[str, str]:
    """The option of each benchmark's judge."""
    return {judgement.request.benchmark: judgement.option for judgement in baseline(*words, space=space).judgements}


# --- benchmark.NAME.SETTING


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("alpaca_eval", "max_new_tokens=8"),
        ("alpaca_eval", "temperature=0.5"),
        ("alpaca_eval", "seed=1"),
        ("alpaca_eval", "top_p=0.5"),
        ("alpaca_eval", "max_prompt_tokens=16"),
        ("alpaca_eval", "use_template=false"),
        ("alpaca_eval", "stop=[END]"),
        ("alpaca_eval", "strip_thinking=false"),
        ("alpaca_eval", "reference=alpaca_eval_gpt4_baseline"),
        ("alpaca_eval", "data=[my/instructions]"),
        ("real_toxicity", "sort_by=threat"),
        ("real_toxicity", "prompts=10"),
        ("red_instruct", "prompt=cot"),
        ("divergence", "seed=1"),
        ("divergence", "prompts=4"),
        ("mmlu", "num_fewshot=0"),
        ("mmlu", "task=mmlu_stem"),
    ],
)
def test_a_setting_that_makes_a_score_makes_another_evaluation(name: str, setting: str) -> None:
    assert evaluation_key(asked(name), f"benchmark.{name}.{setting}") != evaluation_key(asked(name))
    assert ids(expand(*TINY, asked(name), f"benchmark.{name}.{setting}")) == ids(expand(*TINY))


@pytest.mark.parametrize("word", ["evaluation.limit=3", "evaluation.max_new_tokens=5"])
@pytest.mark.parametrize("name", ["alpaca_eval", "divergence"])
def test_how_much_is_generated_makes_another_evaluation(name: str, word: str) -> None:
    assert evaluation_key(asked(name), word) != evaluation_key(asked(name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alpaca_eval", ["judge=gpt4"]),
        ("alpaca_eval", ["judge=endpoint", "judge.model=other"]),
        ("alpaca_eval", ["benchmark.alpaca_eval.judge=endpoint"]),
        ("alpaca_eval", ["benchmark.alpaca_eval.metrics=[win_rate]"]),
        ("alpaca_eval", ["benchmark.alpaca_eval.prompt_file=prompt.txt"]),
        ("alpaca_eval", ["benchmark.alpaca_eval.evaluator=chatgpt"]),
        ("real_toxicity", ["benchmark.real_toxicity.judge=profanity"]),
        ("real_toxicity", ["benchmark.real_toxicity.threshold=0.9"]),
        ("real_toxicity", ["benchmark.real_toxicity.scored=prompt_and_continuation"]),
        ("red_instruct", ["benchmark.red_instruct.folder=elsewhere"]),
        ("red_instruct", ["benchmark.red_instruct.prompt_file=prompt.txt"]),
        ("alpaca_eval", ["evaluation.batch_size=1"]),
        ("mmlu", ["benchmark.mmlu.metrics=['*']"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_who_judges_and_what_is_shown_makes_no_other_evaluation(name: str, words: list[str]) -> None:
    assert evaluation_key(asked(name), *words) == evaluation_key(asked(name))


def test_a_setting_of_one_benchmark_is_none_of_anothers() -> None:
    words = (asked("red_instruct", "red_instruct_cot"), "benchmark.red_instruct.max_new_tokens=8")
    tuned, plain = (baseline(*given).requests for given in (words, words[:1]))
    assert [request.config.max_new_tokens for request in tuned] == [8, 500]
    assert [one.key == other.key for one, other in zip(tuned, plain, strict=True)] == [False, True]


def test_a_benchmark_that_generates_one_text_a_prompt_when_greedy_generates_several_when_it_samples() -> None:
    several = "benchmark.real_toxicity.samples_per_prompt=3"
    fault = one_fault(*TINY, asked("real_toxicity"), several)
    assert fault.startswith("benchmark.real_toxicity.samples_per_prompt: 3 greedy texts")
    assert "benchmark.real_toxicity.temperature=1" in fault
    (request,) = baseline(asked("real_toxicity"), several, "benchmark.real_toxicity.temperature=1").requests
    assert (request.config.samples_per_prompt, request.config.temperature) == (3, 1.0)


FAULTS = {
    "unknown name": ("benchmark.alpaca_evl.seed=1", "benchmark.alpaca_evl.seed=1: ", "did you mean 'alpaca_eval'?"),
    "unknown setting": (
        "benchmark.alpaca_eval.sed=1",
        "benchmark/alpaca_eval.sed: no such key",
        "did you mean 'seed'?",
    ),
    "setting of another kind": ("benchmark.mmlu.seed=1", "benchmark/mmlu.seed: no such key", ""),
    "wrong type": ("benchmark.mmlu.num_fewshot=few", "benchmark/mmlu.num_fewshot: 'few' is not a whole number", ""),
    "out of range": ("benchmark.alpaca_eval.top_p=0", "benchmark/alpaca_eval.top_p: 0 is out of range", ""),
    "another kind": ("benchmark.alpaca_eval.kind=lm_eval", "benchmark/alpaca_eval.kind: 'lm_eval'", "'alpaca_eval'?"),
    "no setting": ("benchmark.alpaca_eval=1", "benchmark.alpaca_eval=1: names no setting", "benchmark.NAME.SETTING"),
    "not evaluated": ("benchmark.bbh.num_fewshot=1", "benchmark.bbh: is not among the benchmarks", "alpaca_eval, mmlu"),
    "deleted": ("~benchmark.mmlu.num_fewshot", "~benchmark.mmlu.num_fewshot: settings cannot be deleted", ""),
    "unknown judge": ("benchmark.alpaca_eval.judge=gtp4", "benchmark.alpaca_eval.judge=gtp4: there is no", "'gpt4'?"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_setting_that_no_benchmark_has_is_told(case: str) -> None:
    word, start, meant = FAULTS[case]
    fault = one_fault(*TINY, asked("alpaca_eval", "mmlu"), word)
    assert fault.startswith(start)
    assert meant in fault


def test_a_setting_of_a_benchmark_is_no_axis() -> None:
    fault = one_fault(*TINY, asked("mmlu"), "benchmark.mmlu.num_fewshot=0,5")
    assert fault.startswith("benchmark.mmlu.num_fewshot=0,5: ")
    assert "one value" in fault
    assert "did you mean" not in fault  # its name is right


def test_a_setting_of_an_lm_eval_task_without_an_option_is_taken_too() -> None:
    word = "benchmark.arc_easy.num_fewshot=2"
    assert evaluation_key(asked("arc_easy"), word) != evaluation_key(asked("arc_easy"))


def test_faults_of_several_settings_are_told_together() -> None:
    words = ("benchmark.mmlu.sed=1", "benchmark.alpaca_eval.seed=x", "benchmark.alpaca_eval.judge=gpt5")
    found = faults(*TINY, asked("alpaca_eval", "mmlu"), *words)
    assert {fault.partition(":")[0] for fault in found} >= {"benchmark/mmlu.sed", "benchmark/alpaca_eval.seed"}
    found = faults(*TINY, asked("alpaca_eval"), "benchmark.nothing.seed=1", "method.betta=1", "judge=gtp4")
    assert len(found) == 3


# --- who judges


def test_a_benchmarks_own_judge_wins_over_the_sweeps() -> None:
    words = (asked("alpaca_eval", "real_toxicity", "red_instruct", "mmlu", "preference"), "judge=gpt4")
    assert judged_by(*words) == {"alpaca_eval": "gpt4", "red_instruct": "gpt4", "real_toxicity": "toxicity_model"}
    own = ("benchmark.red_instruct.judge=endpoint", "benchmark.real_toxicity.judge=profanity")
    assert judged_by(*words, *own) == {
        "alpaca_eval": "gpt4",
        "red_instruct": "endpoint",
        "real_toxicity": "profanity",
    }
    assert judged_by(*words, "benchmark.alpaca_eval.judge=none").keys() == {"red_instruct", "real_toxicity"}
    assert judged_by(*words[:1], "benchmark.alpaca_eval.judge=gpt4") == {
        "alpaca_eval": "gpt4",
        "real_toxicity": "toxicity_model",
    }


def test_the_sweeps_judge_judges_what_has_none_of_its_own() -> None:
    words = (asked("real_toxicity"), "benchmark.real_toxicity.judge=null", "judge=profanity")
    assert judged_by(*words) == {"real_toxicity": "profanity"}


def test_the_sweeps_settings_of_a_judge_hold_where_a_benchmark_names_the_same_one() -> None:
    words = (asked("real_toxicity"), "judge=toxicity_model", "judge.hub_id=my/classifier")
    (judgement,) = baseline(*words).judgements
    assert judgement.judge.hub_id == "my/classifier"


def test_without_a_judge_the_texts_are_generated_and_that_is_all(tmp_path: Path) -> None:
    words = (asked("alpaca_eval"),)
    item = baseline(*words, root=tmp_path)
    assert (item.judgements, item.why) == ([], "evaluate alpaca_eval")
    finish_evaluation(tmp_path, item.requests[0], [metric("response_words", 8)])
    assert baseline(*words, root=tmp_path).done
    judged = baseline(*words, "judge=gpt4", root=tmp_path)
    assert (judged.done, judged.missing, judged.why) == (False, [], "judge alpaca_eval by gpt4")
    assert judged.to_judge == judged.judgements
    finish_judgement(tmp_path, judged.judgements[0], [metric("win_rate", 50)])
    assert baseline(*words, "judge=gpt4", root=tmp_path).done
    assert baseline(*words, root=tmp_path).done
    assert not baseline(*words, "judge=endpoint", root=tmp_path).done


def test_what_is_to_be_judged_waits_for_its_texts(tmp_path: Path) -> None:
    item = baseline(asked("alpaca_eval", "red_instruct"), "judge=gpt4", root=tmp_path)
    assert item.why == "evaluate alpaca_eval, red_instruct; judge alpaca_eval by gpt4, red_instruct by gpt4"
    assert item.to_judge == []
    finish_evaluation(tmp_path, item.requests[1], [metric("response_words", 8)])
    item = baseline(asked("alpaca_eval", "red_instruct"), "judge=gpt4", root=tmp_path)
    assert [judgement.request.benchmark for judgement in item.to_judge] == ["red_instruct"]


def test_each_step_and_each_baseline_is_judged(tmp_path: Path) -> None:
    words = (*TINY, "train.checkpoint_steps=[2,4]", asked("alpaca_eval", "mmlu"), "judge=gpt4")
    finish_training(tmp_path, trained(expand(*words))[0])
    items = plan(expand(*words), tmp_path)
    assert [[j.request.step for j in item.judgements] for item in items] == [[2, 4], [0]]


def test_a_merge_is_judged_as_its_block_says() -> None:
    words = ("+grid=merge", "model=mistral_7b", "seed=0", "method=sft", "merge=slerp", asked("alpaca_eval"))
    (merge,) = [run for run in expand(*words, "judge=gpt4").runs if run.kind == "merge"]
    assert {judge[:2] for scoring in merge.scorings for judge in scoring.judges} == {("alpaca_eval", "gpt4")}


def test_texts_that_two_blocks_have_judged_by_two_judges_are_judged_by_both(grid: Grid) -> None:
    text = "blocks: [{name: one, set: {judge: gpt4}}, {name: two, set: {judge: endpoint}}]"
    (run,) = [run for run in grid(text, *TINY, asked("alpaca_eval")).runs if run.kind == "baseline"]
    item = Planner(NO_ROOT, None).item(run)
    assert [request.benchmark for request in item.requests] == ["alpaca_eval"]
    assert sorted(judgement.option for judgement in item.judgements) == ["endpoint", "gpt4"]


@pytest.mark.parametrize(
    ("words", "start", "needs"),
    [
        (
            ["judge=profanity"],
            "benchmark alpaca_eval: judge=profanity: a judge of kind profanity",
            "openai or causal_lm",
        ),
        (
            ["judge=toxicity_model"],
            "benchmark alpaca_eval: judge=toxicity_model: a judge of kind classifier",
            "causal_lm",
        ),
        (
            ["benchmark.real_toxicity.judge=gpt4"],
            "benchmark real_toxicity: judge=gpt4: a judge of kind openai",
            "classifier or profanity",
        ),
        (["benchmark.real_toxicity.judge=null", "judge=gpt4"], "benchmark real_toxicity: judge=gpt4", "profanity"),
        (["judge=gpt4", "judge.base_url=nowhere"], "judge.base_url: is no address", "http"),
        (
            ["judge=gpt4", "judge.base_url=https://me:key@host/v1"],
            "judge.base_url: holds a name or password in an address",
            "judge.api_key_env",
        ),
        (["judge=gpt4", "judge.api_key_env=sk-0123"], "judge.api_key_env: is no name", "not the key itself"),
        (["judge=gpt4", "judge.base_url=http://10.0.0.5/v1"], "judge=gpt4: judge.base_url", "the key would be sent"),
        (["judge=gpt4", "judge.base_url=http://h/v1", "judge.plain_http=true"], "judge=gpt4: judge", "the key would"),
        (["judge=endpoint", "judge.base_url=http://h:1/v1"], "judge=endpoint: judge.base_url", "judge.plain_http=true"),
        (["judge=gtp4"], "judge=gtp4: judge has no option", "'gpt4'?"),
        (["judge=gpt4", "judge.modle=x"], "judge.modle=x: no such key", "'judge.model'?"),
        (["judge=gpt4", "judge.hub_id=x"], "judge.hub_id=x: no run of this sweep has it", "causal_lm or classifier"),
        (["judge.model=x"], "judge.model=x: no run of this sweep has it", "openai"),
        (["judge=gpt4", "judge.model=a,b"], "judge.model=a,b: is operational", "cannot be an axis"),
        (["judge=gpt4,endpoint"], "judge=gpt4,endpoint: is operational", "cannot be an axis"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_judge_that_cannot_judge_is_a_fault(words: list[str], start: str, needs: str) -> None:
    fault = one_fault(*TINY, asked("alpaca_eval", "real_toxicity"), *words)
    assert fault.startswith(start)
    assert needs in fault


def test_a_key_that_is_given_in_the_place_of_its_variables_name_is_not_repeated() -> None:
    secret = "sk-proj-0123456789abcdef"
    text = " ".join(faults(*TINY, asked("alpaca_eval"), "judge=gpt4", f"judge.api_key_env={secret}"))
    assert "judge.api_key_env" in text
    assert secret not in text


@pytest.mark.parametrize(
    "words", [["judge=gpt4"], ["judge=endpoint", "judge.model=x"], ["judge=profanity"]], ids=" ".join
)
def test_a_judge_makes_no_other_run(words: list[str]) -> None:
    name = asked("real_toxicity" if "judge=profanity" in words else "alpaca_eval")
    one, other = expand(*TINY, name), expand(*TINY, name, *words)
    assert [run.id for run in one.runs] == [run.id for run in other.runs]


def test_a_sweep_judged_by_another_judge_has_a_folder_of_its_own() -> None:
    words = (*TINY, asked("alpaca_eval"))
    given = ([], ["judge=gpt4"], ["judge=gpt4", "judge.model=gpt-4o"], ["judge=gpt4", "judge.concurrency=1"])
    none, gpt4, other, slower = (asked_with(*words, *more).folder for more in given)
    assert len({none, gpt4, other}) == 3
    assert slower == gpt4


# --- what makes a judging


LOCAL = ("judge=local_lm",)
TOXIC = ("benchmark.real_toxicity.judge=null", "judge=toxicity_model")


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["judge=gpt4", "judge.model=gpt-4o"], True),
        (["judge=gpt4", "judge.version=2"], True),
        (["judge=gpt4", "judge.max_tokens=7"], True),
        (["judge=gpt4", "judge.temperature=0.5"], True),
        (["judge=gpt4", "judge.temperature=null"], True),
        (["judge=gpt4", "benchmark.alpaca_eval.max_new_tokens=7"], True),
        (["judge=gpt4", "judge.base_url=http://localhost:1/v1"], False),
        (["judge=gpt4", "judge.concurrency=1"], False),
        (["judge=gpt4", "judge.requests_per_minute=3"], False),
        (["judge=gpt4", "judge.timeout=3"], False),
        (["judge=gpt4", "judge.retries=0"], False),
        (["judge=gpt4", "judge.api_key_env=OTHER_KEY"], False),
        (["judge=gpt4", "judge.token_parameter=max_completion_tokens"], False),
        (["judge=gpt4", "judge.price_per_million_input=null"], False),
        (["judge=gpt4", "judge.price_per_million_output=1"], False),
        (["judge=gpt4", "benchmark.alpaca_eval.metrics=[win_rate]"], False),
        (["judge=gpt4", "evaluation.batch_size=1"], False),
        ([*LOCAL, "judge.hub_id=my/model"], True),
        ([*LOCAL, "judge.revision=v2"], True),
        ([*LOCAL, "judge.precision=nf4"], True),
        ([*LOCAL, "judge.max_tokens=7"], True),
        ([*LOCAL, "judge.batch_size=1"], False),
        ([*TOXIC, "judge.hub_id=my/model"], True),
        ([*TOXIC, "judge.label=toxic"], True),
        ([*TOXIC, "judge.higher_is_better=false"], True),
        ([*TOXIC, "judge.max_length=64"], True),
        ([*TOXIC, "judge.batch_size=1"], False),
        ([*TOXIC, "benchmark.real_toxicity.threshold=0.25"], True),
        ([*TOXIC, "benchmark.real_toxicity.scored=prompt_and_continuation"], True),
        ([*TOXIC, "benchmark.real_toxicity.metrics=[score]"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_judging_is_made_by_the_texts_the_judge_and_the_protocol_alone(words: list[str], changed: bool) -> None:
    start = 2 if words[:2] == list(TOXIC) else 1
    name = asked("real_toxicity" if start == 2 else "alpaca_eval")
    assert (judgement_key(name, *words) != judgement_key(name, *words[:start])) == changed


def test_a_judging_follows_the_prompts_text_not_its_file(tmp_path: Path) -> None:
    for name, text in {"one": "{question} {response}", "copy": "{question} {response}", "two": "{response}?"}.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    words = (asked("red_instruct"), "judge=gpt4")
    keys = {
        name: judgement_key(*words, f"benchmark.red_instruct.prompt_file={tmp_path / name}.txt")
        for name in ("one", "copy", "two")
    }
    assert keys["one"] == keys["copy"]
    assert len({keys["one"], keys["two"], judgement_key(*words)}) == 3
    (tmp_path / "one.txt").write_text("{response}?", encoding="utf-8")
    assert judgement_key(*words, f"benchmark.red_instruct.prompt_file={tmp_path / 'one'}.txt") == keys["two"]


def test_two_options_of_one_judge_give_judgings_of_one_key_in_folders_of_their_own(tmp_path: Path) -> None:
    write_option(tmp_path, "judge/mine", "defaults: [gpt4, _self_]\n")
    space = ConfigSpace([tmp_path])
    mine, theirs = (baseline(asked("alpaca_eval"), f"judge={option}", space=space) for option in ("mine", "gpt4"))
    assert mine.judgements[0].key == theirs.judgements[0].key
    assert mine.judgements[0].name != theirs.judgements[0].name


# --- what must be there before anything starts


PAPER = ("model=tiny", "dataset=everyday", "evaluation=paper")
NEEDED = {
    "cais/mmlu": "benchmark mmlu",
    "SaylorTwift/bbh": "benchmark bbh",
    "tatsu-lab/alpaca_eval": "benchmark alpaca_eval",
    "allenai/real-toxicity-prompts": "benchmark real_toxicity",
    "nicholasKluge/ToxicityModel": "judge=toxicity_model",
}


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a key, an alpaca-eval, a hub or anything of the hub's; its working folder."""
    folder = tmp_path / "bare"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no_hub"))
    monkeypatch.setattr("peft_align.cli.ConfigSpace", lambda *given: shipped())  # composed already
    monkeypatch.setattr("peft_align.grid.benchmarks._evaluator_prompt", lambda evaluator: None)
    return folder


def refused(verb: Any, *words: str) -> list[str]:
    """The faults that a verb is refused for."""
    with pytest.raises(InputError) as caught:
        verb.verb(list(words))
    return [str(fault) for fault in caught.value.faults]


def test_all_that_is_missing_is_told_at_once_before_anything_trains(bare: Path) -> None:
    for verb in (sweep, evaluate):
        found = refused(verb, *PAPER, "judge=gpt4")
        expected = [f"{why}: the " for why in NEEDED.values()]
        expected += [
            "red_instruct (cou): its data is not on the hub",
            "benchmark alpaca_eval: the judge's prompt of alpaca_eval_gpt4 is not here",
            "judge=gpt4: the environment variable OPENAI_API_KEY is not set",
        ]
        assert len(found) == len(expected) == 8
        for start in expected:
            assert [fault for fault in found if fault.startswith(start)], (start, found)
        assert all(any(repo in fault for fault in found) for repo in NEEDED)
        assert list(bare.iterdir()) == []


def test_the_program_exits_with_2(bare: Path, verb: Any, tmp_path: Path) -> None:
    done = verb("sweep", *PAPER, "judge=gpt4", "benchmark.alpaca_eval.prompt_file=nowhere.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("peft_align: 8 faults in the input; nothing was started.\n")
    assert "benchmark.alpaca_eval.prompt_file=nowhere.txt: cannot be read" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_plan_says_what_is_missing_and_starts_all_the_same(bare: Path) -> None:
    asked_for = asked_with(*PAPER, "judge=gpt4")
    content = describe(asked_for, asked_for.plan())
    assert content["from_hub"] == NEEDED
    starts = ("red_instruct (cou): ", "benchmark alpaca_eval: ", "judge=gpt4: ")
    assert sorted(fault.startswith(starts) for fault in content["not_ready"]) == [True] * 3
    assert content["not_judged"] == []
    asked_for = asked_with(*PAPER)
    content = describe(asked_for, asked_for.plan())
    assert content["not_judged"] == ["alpaca_eval", "red_instruct"]
    assert [fault.partition(":")[0] for fault in content["not_ready"]] == ["red_instruct (cou)"]
    assert list(bare.iterdir()) == []


def test_plan_says_of_a_run_that_is_not_trained_yet_what_will_be_judged(bare: Path) -> None:
    asked_for = asked_with(*PAPER, "judge=gpt4")
    train, base = describe(asked_for, asked_for.plan())["run_list"]
    assert (train["kind"], base["kind"]) == ("train", "baseline")
    assert train["to_do"] == f"train; {base['to_do']}"


def test_what_is_there_is_not_missed(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, prompt = tmp_path / "mirror", tmp_path / "prompt.txt"
    for repo in NEEDED:
        (mirror / repo).mkdir(parents=True)
    prompt.write_text("{instruction} {output_1} {output_2}", encoding="utf-8")
    (mirror / "declare-lab/red-instruct/red_prompts").mkdir(parents=True)
    (mirror / "declare-lab/red-instruct/red_prompts/cou.txt").write_text("<question>", encoding="utf-8")
    words = (*PAPER, "judge=gpt4", f"hub.mirror={mirror}", f"benchmark.alpaca_eval.prompt_file={prompt}")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123")
    model = mirror / "nicholasKluge/ToxicityModel"
    (model / "config.json").write_text('{"model_type": "roberta"}', encoding="utf-8")
    (model / "tokenizer.json").write_text("{}", encoding="utf-8")
    save_file({"weight": numpy.zeros(1, numpy.float32)}, model / "model.safetensors")
    found = refused(sweep, *words)
    assert len(found) == 1, found
    (fault,) = found
    assert fault.startswith("red_instruct (cou): ")
    assert "has no harmful_questions/dangerousqa.json" in fault
    (mirror / "declare-lab/red-instruct/harmful_questions").mkdir()
    (mirror / "declare-lab/red-instruct/harmful_questions/dangerousqa.json").write_text("[]", encoding="utf-8")
    asked_for = asked_with(*words)
    sweep.check_inputs(asked_for.plan())
    for given in ("nowhere", str(tmp_path)):
        faulty = asked_with(*words, f"benchmark.red_instruct.folder={given}")
        with pytest.raises(InputError, match=given):
            sweep.check_inputs(faulty.plan())
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert [fault.partition(":")[0] for fault in refused(sweep, *words)] == ["judge=gpt4"]


def test_a_judge_needs_nothing_where_its_judging_is_done(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{instruction} {output_1} {output_2}", encoding="utf-8")
    words = [*TINY, asked("alpaca_eval", "real_toxicity"), "judge=gpt4", f"root={bare}"]
    words.append(f"benchmark.alpaca_eval.prompt_file={prompt}")
    finish_training(bare, trained(expand(*words))[0])
    for item in plan(expand(*words), bare):
        for request in item.requests:
            finish_evaluation(bare, request, [metric("response_words", 8)])
        for judgement in item.judgements:
            finish_judgement(bare, judgement, [metric("win_rate", 50)])
    assert all(item.done for item in plan(expand(*words), bare))
    words[len(TINY)] = asked("alpaca_eval", "real_toxicity", "everyday_mc")  # needs nothing either
    items = plan(expand(*words), bare)
    assert {item.why for item in items} == {"evaluate everyday_mc"}
    assert [str(fault) for fault in needs.unready(items)] == []
    assert needs.not_here(items) == {}


def test_a_stage_asks_only_for_what_it_needs(bare: Path) -> None:
    items = asked_with(*PAPER, "judge=gpt4").plan()
    assert needs.unready(items, ("train", "merge")) == []
    assert needs.not_here(items, ("train", "merge")) == {}
    assert needs.not_here(items, ("judge",)) == {("model", "nicholasKluge/ToxicityModel"): "judge=toxicity_model"}
    assert {fault.where for fault in needs.unready(items, ("judge",))} == {"benchmark alpaca_eval", "judge=gpt4"}
    assert {fault.where for fault in needs.unready(items, ("evaluate",))} == {"red_instruct (cou)"}


# --- on another base than was trained on


def bases(*words: str) -> list[tuple[str, str]]:
    """Kind and base of the runs, as their scores are labelled."""
    runs = expand(*TINY, asked("preference"), *words).runs
    return [(run.kind, run.base_of(scoring.base)) for run in runs for scoring in run.scorings]


def test_another_base_is_another_score_of_the_same_run(tmp_path: Path) -> None:
    words = (*TINY, asked("preference"), "peft=qlora")
    other = (*words, "evaluation.base_precision=bf16")
    assert ids(expand(*words)) == ids(expand(*other))
    finish_training(tmp_path, trained(expand(*words))[0])
    (one, one_base), (two, two_base) = (plan(expand(*given), tmp_path) for given in (words, other))
    assert (one.run.id, one.to_make) == (two.run.id, two.to_make)
    assert one_base.run.id != two_base.run.id
    assert one_base.run.id.startswith("baseline-tiny-nf4-")
    assert two_base.run.id.startswith("baseline-tiny-bf16-")
    keys = [item.requests[0].key or {} for item in (one, two)]
    precisions = [key["base"]["precision"]["base_precision"] for key in keys]
    assert precisions == ["nf4", "bf16"]
    assert keys[0] | {"base": None} == keys[1] | {"base": None}
    assert two_base.requests[0].key == keys[1] | {"adapter": None}
    finish_evaluation(tmp_path, one.requests[0], [metric("accuracy", 0.5)])
    assert [plan(expand(*given), tmp_path)[0].done for given in (words, other)] == [True, False]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["peft=qlora"], [("train", "nf4"), ("baseline", "nf4")]),
        (["peft=qlora", "evaluation.base_precision=nf4"], [("train", "nf4"), ("baseline", "nf4")]),
        (["peft=qlora", "evaluation.base_precision=bf16"], [("train", "bf16"), ("baseline", "bf16")]),
        (["peft=qlora", "evaluation.base_precision=fp32"], [("train", "fp32"), ("baseline", "fp32")]),
        (["peft=lora", "evaluation.base_precision=nf4"], [("train", "nf4"), ("baseline", "nf4")]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_a_baseline_is_on_the_base_that_is_evaluated_on(words: list[str], expected: list[tuple[str, str]]) -> None:
    assert bases(*words) == expected


def test_runs_of_both_precisions_evaluated_on_one_base_have_one_baseline() -> None:
    words = (*TINY, asked("mmlu"), "peft=lora,qlora")
    apart, together = expand(*words), expand(*words, "evaluation.base_precision=bf16")
    of = {name: [run.id for run in s.runs if run.kind == "baseline"] for name, s in (("a", apart), ("t", together))}
    assert (len(of["a"]), len(of["t"])) == (2, 1)
    assert of["t"][0] in of["a"]  # LoRA's own
    assert ids(apart) == ids(together)


def test_the_base_asked_for_is_that_of_the_same_precision_however_it_is_reached() -> None:
    given = [("peft=lora", "evaluation.base_precision=nf4"), ("peft=qlora",)]
    one, other = (
        [run.id for run in expand(*TINY, asked("mmlu"), *words).runs if run.kind == "baseline"] for words in given
    )
    assert one == other


def test_a_sweep_on_another_base_has_a_folder_of_its_own() -> None:
    words = (*TINY, asked("mmlu"), "peft=qlora")
    assert asked_with(*words).folder != asked_with(*words, "evaluation.base_precision=bf16").folder


def test_a_merge_of_quantized_runs_on_a_plain_base_is_not_called_dequantized() -> None:
    words = ("+grid=merge", "model=mistral_7b", "seed=0", "method=sft", "merge=slerp", asked("mmlu"))
    for more, base in (((), "nf4 dequantized"), (("evaluation.base_precision=bf16",), "bf16")):
        (merge,) = [run for run in expand(*words, *more).runs if run.kind == "merge"]
        assert {merge.base_of(scoring.base) for scoring in merge.scorings} == {base}


def test_two_bases_asked_of_one_run_are_both_planned_before_it_is_trained(grid: Grid, tmp_path: Path) -> None:
    text = "blocks: [{name: one}, {name: two, set: {evaluation.base_precision: bf16}}]"
    asked_for = grid(text, *TINY, asked("preference"), "peft=qlora")
    (run,) = trained(asked_for)
    assert len(Planner(tmp_path, None).item(run).missing) == 2
    finish_training(tmp_path, run)
    assert len(Planner(tmp_path, None).item(run).missing) == 2
