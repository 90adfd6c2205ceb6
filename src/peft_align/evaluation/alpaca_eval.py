"""AlpacaEval (Li et al. 2023): a judge ranks the model's output and the reference's for each of 805 instructions."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from peft_align.config.benchmarks import AlpacaEval
from peft_align.data.pairs import Message
from peft_align.evaluation.judges import Ask, filled, first_bit
from peft_align.evaluation.scores import Metric, Scores, mean_metric, rate_metric
from peft_align.evaluation.texts import Data, Question, Sample, check_texts, length_metrics, read_rows

MARKED = re.compile(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", re.DOTALL)  # how alpaca-eval writes a dialogue
DRAW = 1.5
MINIMUM = 20  # annotations from which a length-controlled rate is fitted


def data(benchmark: AlpacaEval, mirror: str | None) -> Data:
    """The instructions with the reference's outputs. Raises InputError."""
    repo = benchmark.data[0]
    rows, inputs = read_rows(repo, benchmark.reference, "eval", mirror)
    check_texts(repo, rows, ("instruction", "output"))
    kept = ("dataset", "output", "generator")
    return Data(
        [
            Question(str(i), row["instruction"], {f"reference_{name}": row.get(name) for name in kept})
            for i, row in enumerate(rows)
        ],
        inputs,
    )


def scores(benchmark: AlpacaEval, samples: Sequence[Sample], generator: str) -> Scores:
    """What needs no judge: lengths; and the outputs (the first of each instruction) in AlpacaEval's own file format."""
    outputs = [
        {
            "instruction": sample["prompt"],
            "output": sample["output"],
            "generator": generator,
            "dataset": sample["reference_dataset"],
        }
        for sample in {sample["question"]: sample for sample in reversed(samples)}.values()
    ][::-1]
    file = json.dumps(outputs, indent=1, ensure_ascii=False) + "\n"
    return Scores(length_metrics(samples), list(samples), files={"outputs.json": file})


def judge(benchmark: AlpacaEval, samples: Sequence[Sample], prompt: str, ask: Ask) -> Scores:
    """Have each pair of outputs ranked.

    Which output the judge reads first is decided by a hash of the instruction, as position sways judges.

    Args:
        benchmark: its settings.
        samples: of `scores`.
        prompt: the judge's, with {instruction}, {output_1} and {output_2}.
        ask: gives the judge's answer to each dialogue.
    """
    swapped = [first_bit(sample["prompt"]) for sample in samples]
    questions = []
    for sample, swap in zip(samples, swapped, strict=True):
        both = [sample["reference_output"], sample["output"]]
        first, second = reversed(both) if swap else both
        questions.append(dialogue(prompt, instruction=sample["prompt"], output_1=first, output_2=second))
    answers = ask(questions)
    judged = []
    for sample, swap, answer in zip(samples, swapped, answers, strict=True):
        found = preference_of(answer)
        judged.append(
            {
                "instruction": sample["prompt"],
                "output_1": sample["reference_output"],
                "generator_1": sample["reference_generator"],
                "dataset": sample["reference_dataset"],
                "output_2": sample["output"],
                "preference": 3 - found if swap and found is not None else found,
                "swapped": swap,
                "answer": answer,
            }
        )
    return Scores(metrics(judged), judged)


def dialogue(prompt: str, **values: str) -> list[Message]:
    """The judge's prompt as messages: alpaca-eval's marks, or one user's turn where there are none."""
    marked = [Message(role, filled(text, **values)) for role, text in MARKED.findall(prompt)]
    return marked or [Message("user", filled(prompt, **values))]


def preference_of(answer: str | None) -> float | None:
    """1 if the answer ranks model_1 first, 2 if model_2; None if it is no such ranking.

    The list of {'model': ..., 'rank': ...} that AlpacaEval's prompt asks for is looked for anywhere in the answer.
    """
    for listed in re.findall(r"\[[^\[\]]*\]", answer or ""):
        try:
            ranks = {str(entry["model"]): int(entry["rank"]) for entry in ast.literal_eval(listed)}
        except (ValueError, SyntaxError, TypeError, KeyError, OverflowError, MemoryError, RecursionError):
            continue
        if ranks.keys() == {"model_1", "model_2"} and set(ranks.values()) == {1, 2}:
            return 1.0 if ranks["model_1"] == 1 else 2.0
    return None


def metrics(annotations: Sequence[dict[str, Any]]) -> list[Metric]:
    """The win rate of the second output in percent, and which share of annotations failed.

    A draw (preference 0 or 1.5) counts half, a failed annotation (null) is left out, as AlpacaEval does.
    """
    wins, differences, clusters = [], [], []
    for annotation in annotations:
        preference = annotation["preference"]
        if preference is not None:
            wins.append((DRAW if preference == 0 else preference) - 1)
            differences.append(len(annotation["output_1"]) - len(annotation["output_2"]))
            clusters.append(annotation["instruction"])
    everything = [annotation["instruction"] for annotation in annotations]
    failed = rate_metric("failed_rate", [a["preference"] is None for a in annotations], False, clusters=everything)
    if not wins:
        return [failed]
    found = [mean_metric("win_rate", wins, True, clusters=clusters, scale=100)]
    if (controlled := length_controlled(wins, differences)) is not None:
        found.append(Metric("length_controlled_win_rate", 100 * controlled, None, len(wins), True))
    return [*found, failed]


def length_controlled(wins: Sequence[float], differences: Sequence[int]) -> float | None:
    """The win rate that a logistic model predicts for outputs as long as the reference's.

    logit P(win) = a + b tanh(d / s), with d the difference of the lengths in characters and s its standard deviation
    (Dubois et al. 2024, arXiv 2404.04475, equation 2 without the term of the instructions' difficulty, which is fitted
    on other models' annotations): sigmoid(a), by maximum likelihood with a weak pull of both towards 0 (C = 100).

    Returns:
        None where it cannot be told: few annotations, wins or losses alone, or no difference of length.
    """
    n = len(wins)
    if n < MINIMUM or min(wins) == max(wins):
        return None
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    if deviation == 0:
        return None
    x = [math.tanh(d / deviation) for d in differences]
    a = b = 0.0
    pull = 0.01
    for _ in range(50):  # Newton's method; the log-likelihood is strictly concave
        p = [1 / (1 + math.exp(-(a + b * xi))) for xi in x]
        ga = math.fsum(w - q for w, q in zip(wins, p, strict=True)) - pull * a
        gb = math.fsum((w - q) * xi for w, q, xi in zip(wins, p, x, strict=True)) - pull * b
        weight = [q * (1 - q) for q in p]
        haa = math.fsum(weight) + pull
        hab = math.fsum(w * xi for w, xi in zip(weight, x, strict=True))
        hbb = math.fsum(w * xi * xi for w, xi in zip(weight, x, strict=True)) + pull
        determinant = haa * hbb - hab * hab
        step_a, step_b = (hbb * ga - hab * gb) / determinant, (haa * gb - hab * ga) / determinant
        a, b = a + step_a, b + step_b
        if abs(step_a) + abs(step_b) < 1e-10:
            break
    return 1 / (1 + math.exp(-a))
