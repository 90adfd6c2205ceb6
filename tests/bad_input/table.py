"""Prints every case of bad input as Markdown: what is wrong, the command, what is told. For reading by eye.

usage: python tests/bad_input/table.py [WORD ...]      # the cases whose area or name holds a word
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from bad_input import Case, run  # noqa: E402
from cases import CASES  # noqa: E402


def row(case: Case) -> str:
    """One case as a line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = run(case, Path(folder))
            command, code, text = " ".join(done.words), str(done.code), done.err or done.out
        except BaseException:
            command, code, text = "", "raised", traceback.format_exc()
        text = text.replace(folder, "FOLDER")
        command = command.replace(folder, "FOLDER")
    told = "<br>".join(line.strip() for line in text.strip().splitlines())
    cells = (case.area, case.name, f"`{command}`", code, told)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(words: list[str]) -> None:
    """Print the table."""
    print("| area | case | command | code | message |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PEFT_ALIGN_CACHE"] = cache
        for case in CASES:
            if not words or any(word in str(case) for word in words):
                print(row(case), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
