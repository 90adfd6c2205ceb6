"""DPO steps of the engine packed against stock TRL, on the same batches of real rows.

    python benchmarks/dpo_vs_trl.py --dataset hh_rlhf

Each variant in a process of its own, in turn, each training the same first steps; the table goes into
docs/performance.md.
"""

from vs_trl import main

if __name__ == "__main__":
    raise SystemExit(main("dpo"))
