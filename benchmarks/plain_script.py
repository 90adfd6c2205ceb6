"""One run as a plain TRL script, for sweep_vs_scripts.py: it shares no code with peft_align.

    python plain_script.py JOB.json

Trains with TRL's own trainers on rows of token ids, saves the adapter, prints the losses as JSON.
"""

import json
import sys
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

with open(sys.argv[1]) as job_file:
    job = json.load(job_file)
with open(job["rows"]) as rows_file:
    rows = json.load(rows_file)
tokenizer = AutoTokenizer.from_pretrained(job["model"])
losses: list[float] = []


class Losses(TrainerCallback):  # type: ignore[misc]
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            losses.append(logs["loss"])


class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # token ids already


common = {
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
    "bf16": job["dtype"] == "bf16",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "max_length": None,
    "gradient_checkpointing": False,
}
lora = LoraConfig(
    task_type="CAUSAL_LM", r=job["r"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=job["target_modules"]
)
dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["dtype"]]
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
set_seed(job["seed"])
if job["method"] == "sft":
    data = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c, _ in rows]
    arguments = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})
    make = SFTTrainer
else:
    data = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows]
    arguments = DPOConfig(**common, beta=job["beta"])
    make = TokenizedDPOTrainer
trainer = make(
    model,
    args=arguments,
    train_dataset=Dataset.from_list(data),
    processing_class=tokenizer,
    peft_config=lora,
    callbacks=[Losses()],
)
trainer.train()
trainer.save_model(job["adapter"])
print(json.dumps({"losses": losses}))
