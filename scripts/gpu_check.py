"""What this machine computes right, and how fast: run it first on a new node. Needs no data and no download.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --size 1b --json check.json
    python scripts/gpu_check.py --model /models/SmolLM2-135M-Instruct --parts rows,engines
    python scripts/gpu_check.py --device cpu --size tiny

torch, transformers and peft do for most parts; parts whose packages are missing are skipped and named. The models are
Llamas of random weights, the texts random tokens with lengths as dialogues have them. Written for CUDA, tried on a CPU
only so far. Exit code: 0 if all that ran holds, 1 if something differs or failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_check_parts import PARTS, SIZES, Figures, Given, first_line

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

GOOD = ("holds", "measured", "skipped")


@dataclass(frozen=True)
class Finding:
    """A line of the table.

    Attributes:
        part: the function that found it.
        check: what was looked at.
        verdict: holds, differs, measured, skipped or failed.
        figures: seconds, relative differences, bytes, or the reason.
    """

    part: str
    check: str
    verdict: str
    figures: Figures


def findings(given: Given, part: str) -> Iterator[Finding]:
    """What a part finds; what it cannot do is a finding too."""
    try:
        for check, found, figures in PARTS[part](given):
            yield Finding(part, check, found, figures)
    except Exception as error:
        package = isinstance(error, ImportError) and (error.name or first_line(error))
        if package and not package.startswith("peft_align"):
            yield Finding(part, "", "skipped", {"why": f"cannot be imported: {package}"})
        else:
            yield Finding(part, "", "failed", {"why": f"{type(error).__name__}: {first_line(error)}"})


def line(finding: Finding) -> str:
    """As the table has it."""
    shown = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in finding.figures.items())
    return f"{finding.part:<9} {finding.check:<26} {finding.verdict:<9} {', '.join(shown)}"


def main() -> int:
    """Run the parts, print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), help="of the random model (default: small; on a CPU tiny)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model of your own instead, in a folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
    asked = parser.parse_args()
    parts = asked.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: no such part: {', '.join(unknown)} (there are {', '.join(PARTS)})")
    if asked.model is not None and not asked.model.is_dir():
        parser.error(f"--model: {asked.model} is not a folder")
    if asked.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # trainers look for themselves
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, trainers would share the work
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {torch.cuda.get_device_name() if where == 'cuda' else 'the CPU: no GPU is checked'}", flush=True)
    size = asked.size or ("small" if where == "cuda" else "tiny")
    given, found = Given(where, size, asked.model), []
    for part in parts:
        for finding in findings(given, part):
            found.append(finding)
            print(line(finding), flush=True)
    bad = [finding for finding in found if finding.verdict not in GOOD]
    print(f"\n{len(found) - len(bad)} of {len(found)} lines are as they should be", *map(line, bad), sep="\n")
    if asked.json:
        content = {"device": where, "size": size, "model": asked.model and str(asked.model), "good": not bad}
        asked.json.write_text(json.dumps(content | {"findings": [asdict(each) for each in found]}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
