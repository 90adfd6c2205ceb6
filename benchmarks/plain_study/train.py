"""One run of a study as a script of its own: TRL's trainer on a LoRA adapter. It shares no code with peft_align.

    python train.py ROWS.json METHOD RANK SEED OUT

ROWS.json: the model's folder, the hyperparameters, and the tokenized rows in the order of training.
"""

import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

path, method, rank, seed, out = sys.argv[1:]
with open(path) as file:
    job = json.load(file)
given = job[method]
rows = job["rows"][seed]
losses = []


class Losses(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            losses.append(float(logs["loss"]))


class TokenizedDPOTrainer(DPOTrainer):
    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


arguments = {
    "output_dir": f"{out}/scratch",
    "max_steps": job["steps"],
    "per_device_train_batch_size": job["micro_batch"],
    "gradient_accumulation_steps": job["batch"] // job["micro_batch"],
    "train_sampling_strategy": "sequential",
    "learning_rate": given["learning_rate"],
    "weight_decay": given["weight_decay"],
    "max_grad_norm": given["max_grad_norm"],
    "lr_scheduler_type": given["schedule"],
    "warmup_steps": given["warmup_steps"],
    "adam_beta1": given["adam_betas"][0],
    "adam_beta2": given["adam_betas"][1],
    "optim": "adamw_torch",
    "seed": int(seed),
    "bf16": job["dtype"] == "bf16",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": not torch.cuda.is_available(),
    "max_length": None,
    "gradient_checkpointing": False,
}
tokenizer = AutoTokenizer.from_pretrained(job["model"])
precision = torch.bfloat16 if job["dtype"] == "bf16" else torch.float32
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=precision)
lora = LoraConfig(
    task_type="CAUSAL_LM",
    r=int(rank),
    lora_alpha=given["alpha"],
    lora_dropout=0.0,
    target_modules=given["target_modules"],
)
set_seed(int(seed))
shared = {"processing_class": tokenizer, "peft_config": lora, "callbacks": [Losses()]}
if method == "sft":
    texts = [
        {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen} for prompt, chosen, rejected in rows
    ]
    options = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = SFTTrainer(model, args=options, train_dataset=Dataset.from_list(texts), **shared)
else:
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} for prompt, chosen, rejected in rows
    ]
    options = DPOConfig(**arguments, beta=given["beta"])
    trainer = TokenizedDPOTrainer(model, args=options, train_dataset=Dataset.from_list(pairs), **shared)
trainer.train()
trainer.save_model(f"{out}/adapter")
with open(f"{out}/losses.json", "w") as file:
    json.dump(losses, file)
