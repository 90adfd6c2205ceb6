"""A plain TRL script, as one would write it without this project: the yardstick for its losses.

    python plain_trl.py JOB.json

Reads rows of HH-RLHF itself, renders and tokenizes them with TRL, trains with TRL's own trainers, prints the losses as
JSON. It shares no code with peft_align; it is told which rows to take in which order, and the hyperparameters.
"""

import gzip
import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

with open(sys.argv[1]) as job_file:
    job = json.load(job_file)
tokenizer = AutoTokenizer.from_pretrained(job["model"])


def turns(text):
    """[(role, content), ...] of an HH-RLHF dialogue."""
    found = []
    for piece in text.split("\n\nHuman:")[1:]:
        human, *assistant = piece.split("\n\nAssistant:")
        found.append(("user", human.strip()))
        found += [("assistant", "\n\nAssistant:".join(assistant).strip())] if assistant else []
    return found


def prompt_text(dialogue):
    if job["template"] == "chat":
        messages = [{"role": role, "content": content} for role, content in dialogue]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = (
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    for role, content in dialogue:
        text += f"USER: {content} ASSISTANT:" if role == "user" else f" {content}</s>"
    return text


with gzip.open(job["data"], "rt", encoding="utf-8") as file:
    lines = file.read().splitlines()
gap = "" if job["template"] == "chat" else " "
rows = []
for index in job["rows"]:
    row = json.loads(lines[index])
    chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
    assert chosen[:-1] == rejected[:-1], "prompts differ"
    prompt = prompt_text(chosen[:-1])
    rows.append({"prompt": prompt, "chosen": gap + chosen[-1][1], "rejected": gap + rejected[-1][1]})

losses = []


class Losses(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            losses.append(logs["loss"])


arguments = {
    "output_dir": job["scratch"],
    "max_steps": job["steps"],
    "per_device_train_batch_size": job["micro_batch"],
    "gradient_accumulation_steps": job["batch"] // job["micro_batch"],
    "train_sampling_strategy": "sequential",
    "learning_rate": job["learning_rate"],
    "weight_decay": job["weight_decay"],
    "max_grad_norm": job["max_grad_norm"],
    "lr_scheduler_type": job["schedule"],
    "optim": "adamw_torch",
    "seed": job["seed"],
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "max_length": None,
    "gradient_checkpointing": False,
}
lora = LoraConfig(
    task_type="CAUSAL_LM", r=job["r"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=job["target_modules"]
)
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
if job["method"] == "sft":
    dataset = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**arguments),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Losses()],
    )
else:
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**arguments, beta=job["beta"]),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Losses()],
    )
trainer.train()
print(json.dumps({"losses": losses}))
