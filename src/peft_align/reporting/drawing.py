"""What vl-convert makes, in a process of its own: while it works, no thread of the process that asks can.

    python -m peft_align.reporting.drawing < {"charts": {NAME: Vega-Lite specification}} > {NAME.svg: base64, ...}
    python -m peft_align.reporting.drawing < {"bundle": the script's last line} > the script

All of it is JSON.
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


def drawn(charts: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """Each chart as NAME.svg and NAME.pdf. Touches no file, so that a thread may wait for it. Raises WorkError."""
    pictures = _made({"charts": charts}, "the figures could not be drawn")
    return {name: base64.b64decode(content) for name, content in pictures.items()}


def bundle(last: str) -> str:
    """Vega, Vega-Lite and vega-embed as one script (0.9 MB) that ends with a line, in two seconds. Raises WorkError."""
    return str(_made({"bundle": last}, "Vega could not be put together"))


def _made(asked: Mapping[str, Any], otherwise: str) -> Any:
    words = [sys.executable, "-m", __name__]
    done = subprocess.run(words, input=json.dumps(asked).encode(), capture_output=True, check=False)
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise WorkError(f"{otherwise}: {told or f'exit code {done.returncode}'}")
    return json.loads(done.stdout)


def main() -> int:
    """Entry point of the process."""
    import vl_convert

    asked = json.load(sys.stdin)
    if "bundle" in asked:
        json.dump(vl_convert.javascript_bundle(asked["bundle"], vl_version=VEGA_LITE), sys.stdout)
        return 0
    pictures: dict[str, bytes] = {}
    for name, spec in asked["charts"].items():
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
