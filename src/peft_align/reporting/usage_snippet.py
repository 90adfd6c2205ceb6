"""Python that uses an exported adapter: with plain transformers and peft, in the form that it was trained in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_align.data.pairs import Message
from peft_align.data.templates import mistral, vicuna
from peft_align.reporting.exported import Exported

DTYPES = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}
QUESTION = "{question}"


def snippet(adapter: Exported) -> str:
    """The program; BASE and ADAPTER are names at its top, for a base that is not on the hub has to be filled in."""
    config = adapter.config
    model, peft = config["model"], config.get("peft") or config["base"]
    quantized = peft["base_precision"] == "nf4"
    lines = ["import torch", "from peft import PeftModel"]
    more = ", BitsAndBytesConfig" if quantized else ""
    lines += [f"from transformers import AutoModelForCausalLM, AutoTokenizer{more}", "", *_names(adapter, model)]
    arguments, keywords = ["BASE"], []
    if revision := adapter.base.get("commit") or (model["revision"] if model["source"] == "hub" else None):
        keywords.append(f"revision={revision!r}")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({', '.join([*arguments, *keywords])})")
    if quantized:
        lines += [
            "quantization = BitsAndBytesConfig(",
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4",',
            f"    bnb_4bit_use_double_quant={bool(peft['double_quantization'])},",
            f"    bnb_4bit_compute_dtype={DTYPES[peft['compute_dtype']]},",
            ")",
        ]
        keywords.append("quantization_config=quantization")
    keywords.append(f"dtype={DTYPES[peft['compute_dtype'] if quantized else peft['base_precision']]}")
    lines.append(f"base = AutoModelForCausalLM.from_pretrained({', '.join([*arguments, *keywords])})")
    lines += [
        "model = PeftModel.from_pretrained(base, ADAPTER).eval()",
        "",
        'question = "How do I get wine stains out?"',
    ]
    lines += _prompt(model["template"])
    lines += [
        "inputs = torch.tensor([ids], device=base.device)",
        "with torch.no_grad():",
        "    output = model.generate(",
        "        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=256, do_sample=False",
        "    )",
        "answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()",
        "print(answer)",
    ]
    return "\n".join(lines) + "\n"


def _names(adapter: Exported, model: Any) -> list[str]:
    hub_id = model["hub_id"]
    if model["source"] == "hub" and not Path(str(hub_id)).expanduser().is_absolute():
        return [f"BASE = {str(hub_id)!r}", 'ADAPTER = "."  # this folder, or its repository on the hub']
    name = Path(str(adapter.base.get("name", "its base"))).name
    return [f'BASE = "FOLDER"  # of {name}: it is not on the hub', 'ADAPTER = "."  # this folder']


def _prompt(template: str) -> list[str]:
    """The token ids of a question, as in training: the tokens that begin a text are put there, not left to options."""
    if template == "chat":
        return [
            'turns = [{"role": "user", "content": question}]',
            "prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)",
            'ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]',
        ]
    (text,) = {"vicuna": vicuna, "mistral": mistral}[template]((Message("user", QUESTION),))
    return [
        f"prompt = {text!r}.replace({QUESTION!r}, question)",
        'ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]',
        "if tokenizer.bos_token_id is not None:",
        "    ids = [tokenizer.bos_token_id, *ids]",
    ]
