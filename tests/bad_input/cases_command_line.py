"""Command lines and overrides: a word, a key, an option, a type or a value that is none."""

from __future__ import annotations

from pathlib import Path

from bad_input import Case, line, write

TINY = ("model=tiny", "dataset=everyday")
OWN = "evaluation.benchmarks=[everyday_mc]"  # reads nothing of the hub


def shown(name: str, *words: str, told: tuple[str, ...], faults: int = 1) -> Case:
    """A command line of `plan`."""
    return line(name, "plan", *words, told=told, faults=faults)


def each_told(name: str, *words: str) -> Case:
    """A command line of `plan` each of whose words has a fault of its own."""
    told = tuple(f"  - {word.removeprefix('+') if 'grid=' in word else word}: " for word in words)
    return shown(name, *words, told=told, faults=len(words))


FAULTY = (
    *("--jsn", "--multirun", "a=[1", "~seed", "hydra.vrbose=1", "seed=", "+grdi=full"),
    *("method.betta=.2", "model=mistal_7b", "peft.r=0", "root=a,b", "train.micro_batch_size=1,2"),
)
KEYS = [
    shown("misspelled key", "method=dpo", "method.betta=.2", told=("method.betta=.2: no such key", "'method.beta'?")),
    shown("misspelled key with +", "+method.betta=.2", told=("+method.betta=.2: no such key", "'method.beta'?")),
    shown("misspelled key with ++", "++method.betta=.2", told=("++method.betta=.2: no such key", "'method.beta'?")),
    shown("misspelled grid", "+grdi=full", told=("+grdi=full: no such key", "'grid'?")),
    shown("unknown grid", "+grid=ful", told=("grid=ful: no such option", "'full'?")),
    shown("misspelled option", "model=mistal_7b", told=("model=mistal_7b: model has no option", "'mistral_7b'?")),
    shown("one misspelled option of several", "model=tiny,tinny", told=("model=tiny,tinny", "'tiny'?")),
    shown("key without its group", "beta=.2", told=("beta=.2: no such key", "'method.beta'?")),
    shown("group as a value", "method.adapter=4", told=("is a group of settings", "its settings: method.adapter.r,")),
    shown("hub as a value", "hub=mirror", told=("is a group of settings", "its settings: hub.mirror")),
    shown("a list as an option", "model=[tiny]", told=("model=[tiny]: model has no option", "tiny")),
    shown("a mapping as an option", "model={a:1}", told=("model={a:1}: model has no option", "with dots: model.a")),
    shown(
        "a group's file by its path", "model=model/tiny.yaml", told=("model has no option 'model/tiny.yaml'", "tiny")
    ),
    shown("key of another group", *TINY, "train.r=8", told=("train.r=8: no such key", "'peft.r'?")),
    shown("kind of an option", *TINY, "method.kind=dpo", told=("method.kind=dpo: what kind it is", "method=dpo")),
    shown("deeper than a setting", "peft.r.x=3", told=("peft.r.x=3: no such key", "'peft.r'?")),
]
VALUES = [
    shown("wrong type", "peft.r=eight", told=("peft.r=eight: 'eight' is not a whole number", "at least 1")),
    shown("fraction for a whole number", "peft.r=7.5", told=("peft.r=7.5: 7.5 is not a whole number",)),
    shown("text for a number", "train.learning_rate='1e-4'", told=("is not a number", "without quotes")),
    shown("number for a truth", "train.gradient_checkpointing=1", told=("is not true or false",)),
    shown("value for a list", "peft.target_modules=q_proj", told=("a list of at least one value", "write [q_proj]")),
    shown("empty list", "peft.target_modules=[]", told=("a list of at least one value", "modules of the base")),
    shown("out of range", "peft.r=0", told=("peft.r=0: 0 is out of range", "at least 1")),
    shown("at an open bound", "method=dpo", "method.beta=0", told=("out of range", "above 0")),
    shown("not a number at all", "train.learning_rate=nan", told=("train.learning_rate=nan", "is not a finite number")),
    shown("infinite", "train.learning_rate=inf", told=("train.learning_rate=inf", "is not a finite number")),
    shown("far too large", "peft.r=99999999999", told=("peft.r=99999999999", "at most 2147483647")),
    shown("one of several out of range", "seed=0,-1", told=("-1 is out of range",)),
    shown("no choice", "train.schedule=cosin", told=("train.schedule=cosin", "'cosine'?")),
    shown("empty value", "seed=", told=("seed=: the value is empty",)),
    shown("empty option", "model=", told=("model=: the value is empty",)),
    shown("empty text", "root=''", *TINY, told=("root='': the value is empty",)),
    shown("null where a value is due", "peft.r=null", told=("peft.r=null: the value is empty",)),
    shown("negative split", *TINY, "dataset.validation_fraction=0.9", told=("0.9 is out of range", "at most 0.5")),
    shown("list of the wrong length", *TINY, "train.adam_betas=[0.9]", told=("2 values are expected", "[0.9]")),
    shown("list with a wrong value", *TINY, "train.checkpoint_steps=[2,x]", told=("'x' is not a whole number",)),
    shown("dangling interpolation", "peft.r=${peft.rr}", told=("${peft.rr}: refers to a setting", "'peft.r'?")),
    shown("circular interpolation", "peft.r=${peft.r}", told=("refers to itself", "peft.r -> peft.r")),
    shown(
        "unknown resolver", *TINY, "peft.r='${foo:1}'", told=("${foo:1}", "interpolation type foo", "${GROUP.SETTING}")
    ),
    shown("a range of nothing", *TINY, "seed=range(3,3)", told=("seed=range(3,3): there is no value in that range",)),
    shown("a range without end", *TINY, "seed=range(0,1000000)", told=("too many values", "at most")),
]
WORDS = [
    shown("unparsable", "a=[1", told=("a=[1: not an override", "key=value")),
    shown("no override", "full", told=("full: not an override: there is no '='", "key=value")),
    shown("empty word", "", told=("'': not an override: there is no '='", "key=value")),
    shown("no key", "=3", told=("=3:", "key=value")),
    shown("unknown flag", "--jsn", "seed=1", told=("--jsn: no such flag", "'--json'?")),
    shown("abbreviated flag", "--js", "seed=1", told=("--js: no such flag",)),
    shown("flag with a value", "--json=yes", "seed=1", told=("--json=yes: --json takes no value", "write --json")),
    shown("hydra's misspelled key", "hydra.vrbose=1", "seed=1", told=("hydra.vrbose=1: Could not override", "verbose")),
    shown("hydra's misspelled key alone", "hydra.vrbose=1", told=("hydra.vrbose=1: Could not override",)),
    shown("multirun", "--multirun", "seed=1", told=("--multirun: Hydra's multirun is not used here", "+grid=NAME")),
    shown("multirun, short", "-m", "seed=1", told=("-m: Hydra's multirun is not used here",)),
    shown("deleted key", "~seed", told=("~seed: settings cannot be deleted",)),
    shown("deleted option", "~model=tiny", told=("~model=tiny: settings cannot be deleted",)),
    shown("a package", "model@x=tiny", told=("a package (@) is not used here", "write model=")),
    shown("key given twice", "seed=1", "seed=2", told=("seed=2: 'seed' is given twice", "seed=1")),
    shown("glob", *TINY, "seed=glob(*)", told=("glob() and interval() are not used here",)),
    shown("own folder that does not exist", "--config-dir", "nowhere", "seed=1", told=("'nowhere' is not a folder",)),
    shown(
        "own folder without a name", "seed=1", "--config-dir", told=("--config-dir: names no folder", "give the folder")
    ),
    shown("nothing", told=("nothing is asked for", "+grid=NAME")),
    line("unknown verb's flag", "sweep", "--json", *TINY, told=("--json: no such flag",)),
]
RUNS = [
    shown(
        "step beyond the last",
        "train.max_steps=4",
        "train.checkpoint_steps=[2,8]",
        told=("train.checkpoint_steps: step 8 is beyond train.max_steps=4",),
    ),
    shown(
        "evaluated step that is not kept",
        *TINY,
        "train.max_steps=4",
        "evaluation.steps=[9]",
        told=("evaluation.steps: step 9 is beyond train.max_steps=4",),
    ),
    shown("unknown benchmark", "evaluation.benchmarks=[mmul]", told=("evaluation.benchmarks: mmul", "'mmlu'?")),
    shown("setting of no benchmark", *TINY, "benchmark.mmul.limit=3", told=("benchmark.mmul.limit=3", "'mmlu'?")),
    shown(
        "unknown setting of a benchmark",
        *TINY,
        "benchmark.mmlu.num_fewshots=3",
        told=("benchmark/mmlu.num_fewshots: no such key", "'num_fewshot'?"),
    ),
    shown(
        "benchmark that is not evaluated",
        *TINY,
        "benchmark.gsm8k.num_fewshot=3",
        told=("benchmark.gsm8k: is not among the benchmarks",),
    ),
    shown("benchmark without a setting", *TINY, "benchmark.mmlu=3", told=("benchmark.NAME.SETTING=value",)),
    shown(
        "tasks in a folder that is not there",
        *TINY,
        "evaluation.benchmarks=[my_task]",
        "evaluation.include_path=nowhere",
        told=("evaluation.include_path=nowhere: is not a folder",),
    ),
    shown(
        "preference that the dataset lacks",
        "dataset=hh_rlhf",
        "preference=mixture",
        told=("dataset hh_rlhf has no preference 'mixture'", "it is defined for beavertails, everyday"),
    ),
    shown(
        "setting of no run",
        "method=sft",
        "method.beta=.2",
        told=("method.beta=.2: no run of this sweep has it", "method=dpo"),
    ),
    shown("operational axis", "train.micro_batch_size=1,2", told=("operational", "cannot be an axis")),
    shown(
        "list meant, axis given",
        *TINY,
        "train.checkpoint_steps=2,4",
        told=("a list stands in brackets", "write train.checkpoint_steps=[2,4]"),
    ),
    shown("axis of the sweep as a whole", "root=a,b", "seed=1", told=("root=a,b: holds for a sweep as a whole",)),
    shown("a merge without a grid", *TINY, "merge=slerp", told=("a merge needs inputs", "+grid=merge")),
    shown(
        "too many cells",
        *TINY,
        "seed=range(0,10000)",
        "train.batch_size=range(1,1000)",
        told=("9990000 cells are too many", "narrow an axis"),
    ),
    line(
        "a model that was not made",
        "sweep",
        "+grid=quickstart",
        told=("model=smollm2_135m: smollm2-135m-instruct", "scripts/fetch_smollm2.py"),
    ),
    shown("model without a repository", *TINY, "model.source=hub", told=("model.hub_id", "name the repository")),
    line(
        "a verb that makes one run, asked for two",
        "train",
        *TINY,
        "seed=0,1",
        told=("2 runs of kind train are asked for", "narrow it"),
    ),
    line("a cell that the sweep does not have", "sweep", *TINY, "cell=7", told=("cell=7", "from 0 to 1")),
    line("select without a search", "select", *TINY, told=("nothing is left to select", "+grid=rank"), faults=2),
    line(
        "select by no axis",
        "select",
        "+grid=rank",
        "model=tiny",
        "select.by=[methd]",
        told=("select.by=methd: is no axis", "'method'?"),
        faults=2,
    ),
    line(
        "judge without a judge",
        "judge",
        *TINY,
        "evaluation.benchmarks=[alpaca_eval]",
        told=("judge: none of the benchmarks", "judge=gpt4"),
    ),
    line("judge of a benchmark that has none", "judge", *TINY, "judge=gpt4", told=("none of the benchmarks",)),
    line("fetch without a place", "fetch", *TINY, told=("hub.mirror: is not set", "hub.mirror=mirror")),
    line("cancel where nothing was submitted", "cancel", *TINY, told=("no jobs of adhoc were submitted",)),
    line("status where nothing was started", "status", told=("there is no sweep under outputs", "+grid=NAME")),
    line(
        "mirror that is not a folder",
        "sweep",
        *TINY,
        OWN,
        "hub.mirror=nowhere",
        told=("hub.mirror=nowhere: is not a folder", "fetch"),
    ),
    line(
        "several GPUs that cannot share a batch",
        "sweep",
        *TINY,
        OWN,
        "train.batch_size=4",
        "resources.gpus=3",
        told=("resources.gpus=3", "divisor of train.batch_size"),
    ),
    shown("time limit that is none", *TINY, "launcher=slurm", "resources.time=soon", told=("'soon' is no time limit",)),
    shown("adapter of several runs", *TINY, "seed=0,1", "adapter=x", told=("2 cells are asked for", "no axes")),
    shown(
        "judge's address with a key in it",
        *TINY,
        "evaluation.benchmarks=[alpaca_eval]",
        "judge=endpoint",
        "judge.base_url=https://sk-1@host/v1",
        told=("judge.base_url", "holds a name or password in an address"),
    ),
    shown(
        "key in the place of its variable",
        *TINY,
        "evaluation.benchmarks=[alpaca_eval]",
        "judge=gpt4",
        "judge.api_key_env=sk-abc",
        told=("judge.api_key_env", "not the key itself"),
    ),
    shown(
        "judge that cannot judge that",
        *TINY,
        "evaluation.benchmarks=[alpaca_eval]",
        "benchmark.alpaca_eval.judge=profanity",
        told=("cannot judge it", "openai or causal_lm"),
    ),
    shown(
        "greedy samples that are all the same",
        *TINY,
        "evaluation.benchmarks=[over_refusal]",
        "benchmark.over_refusal.samples_per_prompt=3",
        told=("would all be the same", "temperature=1"),
    ),
]


def selection(text: str | bytes | None) -> list[str]:
    if text is not None:
        write(Path("best.yaml"), text)
    return ["plan", "+grid=rank", "model=tiny", "+selected=best.yaml"]


SELECTIONS = [
    Case("command line", "selection that is not there", lambda _: selection(None), ("best.yaml: is not there",)),
    Case(
        "command line",
        "selection that is empty",
        lambda _: selection("when: []"),
        ("when: is empty", "peft_align.select"),
    ),
    Case("command line", "selection of another form", lambda _: selection("- a\n- b\n"), ("best.yaml", "a mapping")),
    Case(
        "command line",
        "selection with axes",
        lambda _: selection("when: [{where: {method: dpo}, axes: {peft.r: [8]}}]"),
        ("it has no axes", "set:"),
    ),
    Case(
        "command line",
        "selection of what is no setting of a run",
        lambda _: selection("when: [{where: {method: dpo}, set: {evaluation.limit: 8}}]"),
        ("evaluation.limit: is no setting of a training run",),
    ),
    Case(
        "command line",
        "selection with a misspelled setting",
        lambda _: selection("when: [{where: {method: dpo}, set: {peft.rr: 8}}]"),
        ("peft.rr: no such key", "'peft.r'?"),
    ),
    Case(
        "command line",
        "selection that is not UTF-8",
        lambda _: selection(b"when: [\xff\xfe]"),
        ("best.yaml: is not UTF-8 (byte 7)", "save it as UTF-8"),
    ),
]

SEVERAL = [
    each_told("the line and its keys", *FAULTY),
    each_told("a grid and its overrides", "+grid=quikstart", "+grid=mian", "model=mistal_7b", "peft.r=eight"),
    each_told("a flag and an operational axis", "--jsn", "evaluation.limit=1,2"),
    shown(
        "values that are found while building",
        "train.checkpoint_steps=[900]",
        "evaluation.benchmarks=[mmul]",
        "dataset=hh_rlhf,beavertails",
        "preference=mixture",
        faults=3,
        told=("step 900 is beyond", "mmul", "hh_rlhf has no preference"),
    ),
]

CASES = [*KEYS, *VALUES, *WORDS, *RUNS, *SELECTIONS, *SEVERAL]
