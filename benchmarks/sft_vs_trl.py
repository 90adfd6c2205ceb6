"""SFT steps of the engine packed against stock TRL, on the same batches of real rows.

    python benchmarks/sft_vs_trl.py --dataset hh_rlhf

Both in one process on one base, in turn; the table goes into docs/performance.md.
"""

from vs_trl import main

if __name__ == "__main__":
    raise SystemExit(main("sft"))
