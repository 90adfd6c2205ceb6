"""The same prompts answered by several runs, side by side: which prompts, which runs, and what was said of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_align.grid.planner import Item, Request
from peft_align.reporting.cells import plain
from peft_align.reporting.samples import BROKEN, FILE, Sample, has_texts, is_sensitive, lines, sample_of
from peft_align.reporting.told import Scored, Told, labels, number, told_of
from peft_align.terminal import shown

RUNS = 12  # that answer a prompt, at most
BASELINES = 2
CUT = " [...] "


@dataclass(eq=False)
class Answering:
    """One run's answers to one benchmark, at its last step."""

    told: Told
    request: Request
    judged: list[Scored]
    score: float | None = None  # of the benchmark's main measure
    higher_is_better: bool | None = None
    samples: dict[str, Sample] = field(default_factory=dict)

    @property
    def is_base(self) -> bool:
        return self.told.run.kind == "baseline"

    @property
    def method(self) -> tuple[str, ...]:
        """How it was made; answers are taken from as many of these as there is room for."""
        axes = self.told.run.axes
        return (self.told.run.kind, *(str(axes.get(key)) for key in ("method", "merge", "adapter")))

    @property
    def cell(self) -> tuple[str, ...]:
        axes = self.told.run.axes
        return tuple(f"{key}={axes[key]}" for key in sorted(axes))


def answers(
    items: Sequence[Item],
    root: Path,
    prompts: int = 50,
    length: int = 1500,
    told: Mapping[str, Told] | None = None,
) -> list[dict[str, Any]]:
    """Prompts with the answers of several runs at their last step, as JSON has it.

    The prompts are spread over the benchmarks that have texts, and over the base models: answers are beside those of
    their own base. Which prompts, a hash decides, so that it is always the same. Of many runs, 12 answer a prompt: up
    to two unaligned bases, the best and the worst by the benchmark's main measure, and of the others one for each
    method in turn, each from another cell as long as there is one.

    Args:
        items: the state of the runs.
        root: where they lie.
        prompts: how many, at most.
        length: characters of a prompt and of an answer; of a longer prompt the middle is left out, of an answer the
            end.
        told: what was read of the runs, to which is added what could not be; None: it is read now.

    Returns:
        For each prompt: benchmark, model, prompt, prompt_cut, sensitive (it asks for harm, or a judge found harm in an
        answer), runs (that have answers to this benchmark), shown (of these), chosen (how, in words), reference (label,
        text, cut; what answers are compared with, or None), and answers, the unaligned base's first: run_id, label,
        text, cut, ended, scores. Texts are rid of secrets and of control characters, and escaped for nothing else.
    """
    told = told_of(items, root) if told is None else told
    names = labels([item.run for item in items])
    groups = _groups(told.values())
    left, found = prompts, list[dict[str, Any]]()
    opened: list[tuple[list[Answering], dict[str, int], int]] = []
    for members in groups:
        if len(opened) == prompts:
            break
        chosen, keys = _open(members)
        if keys:
            opened.append((chosen, keys, len(members)))
    seen: dict[str, int] = {}  # prompts of a benchmark that other models answer
    for i, (chosen, keys, runs) in enumerate(opened):
        share = min(len(keys), -(-left // (len(opened) - i)))
        benchmark = chosen[0].request.benchmark
        start = seen.get(benchmark, 0)
        wanted = [list(keys)[(start + j) % len(keys)] for j in range(share)]
        seen[benchmark] = start + share
        _read(chosen, {key: keys[key] for key in wanted})
        entries = [_entry(chosen, key, names, length, runs) for key in wanted]
        found += [entry for entry in entries if entry["answers"]]
        left -= share
        for each in chosen:
            each.samples.clear()
    return found


def _groups(told: Iterable[Told]) -> list[list[Answering]]:
    """The runs that have answers, by base model and benchmark: all benchmarks of the first model come first."""
    found: dict[tuple[str, str], list[Answering]] = {}
    for own in told:
        if own.run.is_parent_only:
            continue
        last: dict[str, Answering] = {}
        for scored in own.scored:
            request = scored.request
            if not has_texts(request.config):
                continue
            if scored.judgement is not None:
                if (there := last.get(request.benchmark)) and there.request is request:
                    there.judged.append(scored)
                    _rate(there, scored)
                continue
            before = last.get(request.benchmark)
            if before is None or _rank(request) > _rank(before.request):
                last[request.benchmark] = Answering(own, request, [])
                _rate(last[request.benchmark], scored)
        for benchmark, answering in last.items():
            found.setdefault((own.run.choices["model"], benchmark), []).append(answering)
    models = list(dict.fromkeys(model for model, _ in found))
    order = sorted(found, key=lambda key: (models.index(key[0]), key[1]))
    return [found[key] for key in order]


def _rank(request: Request) -> tuple[int, int]:
    """Of several evaluations of one run the last step counts, of those the one without a limit, or with the largest."""
    limit = request.scoring.evaluation.limit
    return request.step, 2**62 if limit is None else limit


def _rate(answering: Answering, scored: Scored) -> None:
    """Note the value of the benchmark's main measure, if this record has it."""
    wanted = answering.request.config.metrics[0]
    for metric in scored.record["metrics"]:
        if answering.score is None and wanted in (plain(str(metric["name"])), "*") and not metric["part"]:
            answering.score = number(metric, "value")
            answering.higher_is_better = metric["higher_is_better"]


def _open(members: Sequence[Answering]) -> tuple[list[Answering], dict[str, int]]:
    """The runs that are shown, and the prompts that the first of them answered, in the order of a hash, with the place
    in its file."""
    candidates = choose(members)
    while candidates:
        first = candidates[0]
        try:
            keys = _keys(first)
        except BROKEN as error:
            _tell(first, FILE, error)
            candidates = candidates[1:]
            continue
        order = sorted(keys, key=lambda key: hashlib.sha256(key.encode(errors="replace")).digest())
        return candidates, {key: keys[key] for key in order}
    return [], {}


def choose(members: Sequence[Answering], most: int = RUNS) -> list[Answering]:
    """The runs that answer, bases first. See `answers`."""
    bases = [each for each in members if each.is_base][:BASELINES]
    others = [each for each in members if not each.is_base]
    picked = list(bases)
    rated = sorted((each for each in others if each.score is not None), key=_goodness, reverse=True)
    if len(others) > most - len(bases) and len(rated) > 1:
        picked += [rated[0], rated[-1]]
    by_method: dict[tuple[str, ...], dict[tuple[str, ...], list[Answering]]] = {}
    for each in others:
        if each not in picked:
            by_method.setdefault(each.method, {}).setdefault(each.cell, []).append(each)
    # one of each cell, then the second of each: seeds are the most alike
    queues = [
        [own[i] for i in range(max(map(len, cells.values()))) for own in cells.values() if i < len(own)]
        for cells in by_method.values()
    ]
    while any(queues) and len(picked) < most:
        for queue in queues:
            if queue and len(picked) < most:
                picked.append(queue.pop(0))
    order = {id(each): i for i, each in enumerate(members)}
    return [*bases, *sorted(picked[len(bases) :], key=lambda each: order[id(each)])]


def _goodness(each: Answering) -> float:
    score = each.score or 0.0
    return -score if each.higher_is_better is False else score


def _folder(each: Answering) -> Path:
    return each.told.directory.evaluation(each.request.name)


def _keys(each: Answering) -> dict[str, int]:
    """The prompts that a run answered, with the place of the first answer. Raises one of BROKEN."""
    keys: dict[str, int] = {}
    for place, line in lines(_folder(each) / FILE):
        sample = sample_of(each.request.config, line, {})
        if sample is None:
            return {}  # a benchmark that chooses among answers
        keys.setdefault(sample.key, place)
    return keys


def _lines_of(each: Answering, wanted: Mapping[str, int]) -> dict[int, dict[str, Any]]:
    """A run's answers to these prompts, by their place: where another run has them, or anywhere. Raises BROKEN."""
    for places in (set(wanted.values()), None):
        found: dict[int, dict[str, Any]] = {}
        keys: set[str] = set()
        for place, line in lines(_folder(each) / FILE, places):
            sample = sample_of(each.request.config, line, {})
            if sample is not None and sample.key in wanted and sample.key not in keys:
                keys.add(sample.key)
                found[place] = line
        if len(found) == len(wanted):
            break
    return found


def _read(chosen: Sequence[Answering], wanted: Mapping[str, int]) -> None:
    """Keep the samples of these prompts, of each run. What cannot be read is told, and left out."""
    for each in chosen:
        try:
            there = _lines_of(each, wanted)
        except BROKEN as error:
            _tell(each, FILE, error)
            continue
        said: dict[int, dict[str, dict[str, Any]]] = {}
        for scored in each.judged:
            judgement = scored.judgement
            assert judgement is not None
            folder = each.told.directory.judgement(each.request.name, judgement.name)
            try:  # a judge writes a line for each sample, in their order
                for place, line in lines(folder / FILE, there):
                    said.setdefault(place, {})[str(scored.record["judge"])] = line
            except BROKEN as error:
                _tell(each, f"judgements/{judgement.name}/{FILE}", error)
        for place, line in there.items():
            if sample := sample_of(each.request.config, line, said.get(place, {})):
                each.samples[sample.key] = sample


def _tell(each: Answering, name: str, error: BaseException) -> None:
    what = " ".join(str(error).split())[:200]
    each.told.faults.append(f"evaluations/{each.request.name}/{name} cannot be read: {what}")


def _entry(chosen: Sequence[Answering], key: str, names: Mapping[str, str], length: int, runs: int) -> dict[str, Any]:
    those = [each for each in chosen if key in each.samples]
    found = [each.samples[key] for each in those]
    request = chosen[0].request
    entry: dict[str, Any] = {"benchmark": request.benchmark, "model": chosen[0].told.run.choices["model"]}
    entry |= {"prompt": None, "prompt_cut": False, "sensitive": is_sensitive(request.config, found)}
    entry |= {"runs": runs, "shown": len(those), "chosen": _how(runs, len(those), request), "reference": None}
    if found:
        prompt = shown(found[0].prompt)
        entry |= {"prompt": _without_middle(prompt, length), "prompt_cut": len(prompt) > length}
        if found[0].reference is not None:
            reference, whose = (shown(part) for part in found[0].reference)
            entry["reference"] = {"label": whose, "text": reference[:length], "cut": len(reference) > length}
    entry["answers"] = [_answer(each, sample, names, length) for each, sample in zip(those, found, strict=True)]
    return entry


def _answer(each: Answering, sample: Sample, names: Mapping[str, str], length: int) -> dict[str, Any]:
    text = shown(sample.text)
    scores = {shown(name): shown(v) if isinstance(v, str) else v for name, v in sample.scores.items()}
    return {
        "run_id": each.told.run.id,
        "label": shown(names[each.told.run.id]),
        "text": text[:length],
        "cut": len(text) > length,
        "ended": sample.ended,
        "scores": scores,
    }


def _how(runs: int, there: int, request: Request) -> str:
    if there == runs:
        return f"all {runs} runs that have answers"
    measure = request.config.metrics[0]
    by = "" if measure == "*" else f" by {measure}"
    return f"{there} of {runs} runs: unaligned bases, the best and the worst{by}, and others spread over methods"


def _without_middle(text: str, length: int) -> str:
    """A text of at most so many characters, its beginning and its end: what is asked may stand in either."""
    if len(text) <= length:
        return text
    half = (length - len(CUT)) // 2
    return text[:half] + CUT + text[len(text) - half :]
