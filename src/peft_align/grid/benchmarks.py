"""Benchmarks and judges by name: an option of conf/benchmark/, or any lm-eval task; an option of conf/judge/."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from peft_align.config import validate
from peft_align.config.benchmarks import BENCHMARKS, JUDGED_BY, AlpacaEval, Benchmark, Generated, RedInstruct
from peft_align.config.compose import ConfigSpace
from peft_align.config.judges import JUDGES, Endpoint, Judge, NoJudge, sent_in_the_clear
from peft_align.errors import Fault, InputError, suggest
from peft_align.store.hub import mirrored
from peft_align.store.records import Digests, digest_of, inventory

EVALUATION = Path(__file__).parents[1] / "evaluation"
OWN_TASKS = EVALUATION / "tasks"  # lm-eval tasks that the package carries
RED_INSTRUCT = "declare-lab/red-instruct"
QUESTIONS = ("harmful_questions/dangerousqa.json", "dangerousqa.json")  # in a clone, or beside the prompts
LABELLED = ("{question}", "{response}")
# What a judge's prompt must have, by kind of benchmark.
PLACES = {
    "alpaca_eval": ("{instruction}", "{output_1}", "{output_2}"),
    "red_instruct": LABELLED,
    "over_refusal": LABELLED,
}
OWN_PROMPTS = EVALUATION / "prompts"  # for judges


def find_benchmark(
    space: ConfigSpace, name: str, include_path: str | None, tuned: Mapping[str, Any], faults: list[Fault]
) -> Benchmark | None:
    """The benchmark's settings; a name that is no option is looked for among lm-eval's tasks.

    Args:
        space: knows the options.
        name: of the benchmark.
        include_path: the user's folder of lm-eval tasks.
        tuned: settings given as benchmark.NAME.SETTING=value.
        faults: what is wrong is added to them.
    """
    if name in space.options("benchmark"):
        found: Benchmark | None = of_kind(
            BENCHMARKS, f"benchmark/{name}.yaml", space.load("benchmark", name), tuned, faults
        )
        if isinstance(found, Generated) and found.samples_per_prompt > 1 and found.temperature == 0:
            what = f"{found.samples_per_prompt} greedy texts of a prompt would all be the same"
            hint = f"sample: benchmark.{name}.temperature=1"
            faults.append(Fault(f"benchmark.{name}.samples_per_prompt", what, hint))
        return found
    where = f"evaluation.benchmarks: {name}"
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        hint = "give the folder of your own lm-eval task files"
        faults.append(Fault(f"evaluation.include_path={include_path}", "is not a folder", hint))
        return None
    if not lm_eval_has(name, include_path):
        known = space.options("benchmark")
        faults.append(Fault(where, "is neither an option of conf/benchmark/ nor an lm-eval task", suggest(name, known)))
        return None
    plain = {"kind": "lm_eval", "task": name, "num_fewshot": None, "metrics": ["*"], "data": []}
    task: Benchmark | None = of_kind(BENCHMARKS, f"benchmark {name}", plain, tuned, faults)
    return task


def find_judge(
    space: ConfigSpace, name: str, benchmark: Benchmark, of_sweep: tuple[str, Judge], faults: list[Fault]
) -> tuple[str, Judge] | None:
    """The judge of a benchmark, its own or the sweep's, by its option's name; None if nothing is to be judged."""
    if not isinstance(benchmark, Generated):
        return None
    option, judge = of_sweep
    if benchmark.judge not in (None, option):  # the sweep's may have settings of the command line
        if benchmark.judge not in space.options("judge"):
            hint = suggest(str(benchmark.judge), space.options("judge"))
            faults.append(Fault(f"benchmark.{name}.judge={benchmark.judge}", "there is no such judge", hint))
            return None
        try:
            node = space.node("judge", str(benchmark.judge))
        except InputError as error:
            faults += error.faults
            return None
        option, judge = str(benchmark.judge), of_kind(JUDGES, f"judge/{benchmark.judge}.yaml", node, {}, faults)
    if judge is None or isinstance(judge, NoJudge):
        return None
    kind = benchmark.kind
    if isinstance(judge, Endpoint):
        faults += endpoint_faults(option, judge)
    if judge.kind not in JUDGED_BY[kind]:
        what = f"a judge of kind {judge.kind} cannot judge it"
        hint = f"it needs one of kind {' or '.join(JUDGED_BY[kind])}: benchmark.{name}.judge=NAME"
        faults.append(Fault(f"benchmark {name}: judge={option}", what, hint))
        return None
    return option, judge


def judge_prompt(benchmark: Benchmark) -> str | None:
    """The text that an answering judge is given, with {placeholders}; None if its file is not there.

    AlpacaEval's belong to alpaca-eval and are read from an installed one; the package has its own of the others.
    """
    given: str | None = getattr(benchmark, "prompt_file", None)
    path: Path | None = Path(given).expanduser() if given else None
    if path is None and isinstance(benchmark, AlpacaEval):
        path = _evaluator_prompt(benchmark.evaluator)
    elif path is None:
        path = OWN_PROMPTS / f"{benchmark.kind}.txt"
    try:
        return path.read_text(encoding="utf-8") if path else None
    except (OSError, UnicodeDecodeError):
        return None


def prompt_fault(name: str, benchmark: Benchmark) -> Fault | None:
    """What is wrong with the prompt of a benchmark's judge, if anything: not there, or not showing what is judged."""
    text = judge_prompt(benchmark)
    if text is None:
        return no_prompt(name, benchmark)
    absent = [place for place in PLACES[benchmark.kind] if place not in text]
    if not absent:
        return None
    what = f"has no {', '.join(absent)}, where the judge is shown what it judges"
    return Fault(f"benchmark.{name}.prompt_file={getattr(benchmark, 'prompt_file', None)}", what, "write them into it")


def no_prompt(name: str, benchmark: Benchmark) -> Fault:
    """What to tell people when the prompt of a benchmark's judge is not there."""
    given = getattr(benchmark, "prompt_file", None)
    if given:
        return Fault(f"benchmark.{name}.prompt_file={given}", "cannot be read", "give a text file in UTF-8")
    what = f"the judge's prompt of {getattr(benchmark, 'evaluator', name)} is not here"
    hint = f"pip install alpaca-eval, or give its file: benchmark.{name}.prompt_file=PATH"
    return Fault(f"benchmark {name}", what, hint)


def red_instruct_files(benchmark: RedInstruct, mirror: str | None) -> tuple[Path, Path, Path] | Fault:
    """The folder of Red-Instruct's data, its questions and its red-teaming prompt; or what is missing of them."""
    where = f"red_instruct ({benchmark.prompt})"
    hint = "git clone https://github.com/declare-lab/red-instruct, then benchmark.NAME.folder=ITS_PATH"
    folder = Path(benchmark.folder).expanduser() if benchmark.folder else mirrored(mirror, RED_INSTRUCT)
    if folder is None or not folder.is_dir():
        place = str(folder) if folder else f"hub.mirror/{RED_INSTRUCT}"
        return Fault(where, f"its data is not on the hub, and {place} is not there", hint)
    found = []
    for places in (QUESTIONS, (f"red_prompts/{benchmark.prompt}.txt",)):
        path = next((folder / place for place in places if (folder / place).is_file()), None)
        if path is None:
            return Fault(where, f"{folder} has no {places[0]}", hint)
        found.append(path)
    return folder, found[0], found[1]


def _evaluator_prompt(evaluator: str) -> Path | None:
    """The prompt file of one of alpaca-eval's evaluators, if that is installed; it is not imported."""
    spec = find_spec("alpaca_eval")
    for location in (spec.submodule_search_locations or []) if spec else []:
        configs = Path(location) / "evaluators_configs"
        try:
            settings = yaml.safe_load((configs / evaluator / "configs.yaml").read_text(encoding="utf-8"))
            return configs / str(settings[evaluator]["prompt_template"])
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            continue
    return None


def endpoint_faults(option: str, judge: Endpoint) -> list[Fault]:
    """What is wrong with an endpoint's address."""
    told = sent_in_the_clear(judge)
    hint = (
        "use https://" if judge.api_key_env else "use https://, or allow it in your own network: judge.plain_http=true"
    )
    return [Fault(f"judge={option}: judge.base_url={judge.base_url}", told, hint)] if told else []


def of_kind(
    kinds: Mapping[str, type], where: str, node: Mapping[str, Any], tuned: Mapping[str, Any], faults: list[Fault]
) -> Any:
    """The dataclass that the node's `kind` names, with settings given on the command line; None if there are faults."""
    kind = str(node.get("kind"))
    if kind not in kinds:
        faults.append(Fault(f"{where}: kind", f"'{kind}' is not one", suggest(kind, kinds)))
        return None
    return validate.convert(kinds[kind], {**node, **tuned}, where.removesuffix(".yaml"), faults)


def task_folders(include_path: str | None) -> list[Path]:
    """Where lm-eval task files lie: the user's, the package's, lm-eval's."""
    spec = find_spec("lm_eval")
    builtin = [Path(p) / "tasks" for p in (spec.submodule_search_locations or [])] if spec else []
    return [*([Path(include_path).expanduser()] if include_path else []), OWN_TASKS, *builtin]


@functools.cache
def lm_eval_has(name: str, include_path: str | None) -> bool:
    """Whether a task, group or tag of this name is declared. Reads the YAML files as text: lm-eval imports slowly."""
    return any(_declares(folder, name) for folder in task_folders(include_path))


def _declares(folder: Path, name: str) -> bool:
    quoted = re.escape(name.encode())
    declared = re.compile(rb"^[\s\-\"']*(?:task|group|tag)[\"']?:\s*[\"']?" + quoted + rb"[\"']?\s*$", re.MULTILINE)
    listed = re.compile(
        rb"^(?:tag|group):[ \t]*\n(?:[ \t]*-[^\n]*\n)*?[ \t]*-[ \t]*[\"']?" + quoted + rb"[\"']?[ \t]*$",
        re.MULTILINE,
    )
    for path in folder.rglob("*.yaml"):
        text = path.read_bytes()
        if name.encode() in text and (declared.search(text) or listed.search(text)):
            return True
    return False


@functools.cache
def task_definition(name: str, include_path: str | None) -> str | None:
    """The digest of the folder that defines a task of the user's or the package's; lm-eval's go by its version."""
    for folder in task_folders(include_path)[: 2 if include_path else 1]:
        if _declares(folder, name):
            digests = Digests()
            files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
            return digest_of(inventory(folder, [path.relative_to(folder).as_posix() for path in files], digests))
    return None
