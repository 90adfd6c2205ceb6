"""Found by each Python process whose PYTHONPATH has this folder: hooks it, if the environment says what to break."""

import json
import os
import sys

if os.environ.get("PEFT_ALIGN_TEST_FAULT"):
    from audit import Fault, install

    hook = install()
    hook.role = "worker" if "peft_align.launch.job" in sys.orig_argv else "sweep"
    hook.arm(Fault(**json.loads(os.environ["PEFT_ALIGN_TEST_FAULT"])))
