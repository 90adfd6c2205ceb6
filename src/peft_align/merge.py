"""Merge adapters into one model, in this process; inputs that are not trained yet are trained first.

usage: python -m peft_align.merge +grid=NAME key=value ... [--cfg] [--config-dir DIR]

  A grid names the inputs; the words narrow it to one merge. merge.save says what is written besides the recipe.

examples:
  python -m peft_align.merge +grid=merge model=mistral_7b seed=0 merge=slerp method=sft
  python -m peft_align.merge +grid=merge model=mistral_7b seed=0 merge=slerp method=dpo merge.save=full
  python -m peft_align.merge +grid=merge model=mistral_7b seed=0 merge=linear method=sft merge.save=adapter
"""

from __future__ import annotations

import sys

from peft_align.cli import run_verb
from peft_align.train import make_one


def verb(argv: list[str]) -> int:
    return make_one(argv, "merge")


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
