"""Python runs this at its start where this folder is on its path: notes what is unpickled, and whose code is run."""

import json
import os
import sys
from typing import Any

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt")


def watch(log: str, below: list[str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*what: Any) -> None:
        os.write(file, (json.dumps(what) + "\n").encode())

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            frame, files = sys._getframe(1), []
            while frame is not None:
                files.append(frame.f_code.co_filename)
                frame = frame.f_back  # type: ignore[assignment]
            note("unpickled", f"{args[0]}.{args[1]}", files)
        elif event == "open" and isinstance(args[0], str) and args[0].endswith(PICKLED) and "r" in str(args[1] or "r"):
            note("opened", args[0], [])
        elif event in ("exec", "compile"):
            name = args[0].co_filename if event == "exec" else args[1]
            if isinstance(name, (str, bytes)) and os.fsdecode(name).startswith(tuple(below)):
                note("run", os.fsdecode(name), [])

    sys.addaudithook(hook)


if "AUDIT_LOG" in os.environ:
    watch(os.environ["AUDIT_LOG"], os.environ["AUDIT_BELOW"].split(os.pathsep))
