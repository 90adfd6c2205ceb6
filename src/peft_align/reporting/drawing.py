"""Charts as SVG and PDF, in a process of its own: while vl-convert draws, no thread of the process that asks can work.

    python -m peft_align.reporting.drawing < specifications > pictures

What goes in is {name: Vega-Lite specification}, what comes out {NAME.svg: base64, NAME.pdf: base64}, both as JSON.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from peft_align.errors import WorkError
from peft_align.terminal import say

VEGA_LITE = "6.4"  # of those that vl-convert carries, the one that Altair's schema is of


def drawn(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """Each chart as NAME.svg and NAME.pdf. Touches no file, so that a thread may wait for it. Raises WorkError."""
    asked = json.dumps(specs).encode()
    done = subprocess.run([sys.executable, "-m", __name__], input=asked, capture_output=True, check=False)
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise WorkError(f"the figures could not be drawn: {told or f'exit code {done.returncode}'}")
    return {name: base64.b64decode(content) for name, content in json.loads(done.stdout).items()}


def main() -> int:
    """Entry point of the process that draws."""
    import vl_convert

    pictures: dict[str, bytes] = {}
    for name, spec in json.load(sys.stdin).items():
        try:
            svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE, allowed_base_urls=[])
            pictures |= {f"{name}.svg": svg.encode(), f"{name}.pdf": vl_convert.svg_to_pdf(svg)}
        except ValueError as error:
            say(f"{name}: {' '.join(str(error).splitlines()[:2])}", file=sys.stderr)  # the rest is JavaScript's stack
            return 1
    json.dump({name: base64.b64encode(content).decode() for name, content in pictures.items()}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
