"""Realistic configs of LLaMA-Factory, Axolotl and TRL, and the data files that they name."""

import json
from pathlib import Path

LLAMAFACTORY = """\
### model
model_name_or_path: org/base-7b-instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj

### dataset
dataset: tickets,manual
dataset_dir: sets
template: qwen
cutoff_len: 1024
max_samples: 500
preprocessing_num_workers: 8

### output
output_dir: saves/tickets
logging_steps: 10
save_steps: 200
report_to: wandb
hf_hub_token: hf_abcdef

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
deepspeed: examples/deepspeed/ds_z2_config.json
neftune_noise_alpha: 5

### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 100
"""

DATASET_INFO = {
    "tickets": {
        "file_name": "tickets.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "system"},
    },
    "manual": {
        "file_name": "manual.jsonl",
        "columns": {"prompt": "question", "response": "answer"},
        "num_samples": 40,
    },
    "openai": {
        "file_name": "openai.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "remote": {"hf_hub_url": "org/rows", "columns": {"prompt": "instruction"}},
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "pictures": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"images": "images"}},
}

AXOLOTL = """\
base_model: org/base-8b
model_type: AutoModelForCausalLM
load_in_4bit: true
strict: false

datasets:
  - path: data/chats.jsonl
    ds_type: json
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
  - path: org/instructions
    type: alpaca
    split: train[:10%]
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/qlora

adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true

sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
excess_length_strategy: truncate

micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 4
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
warmup_steps: 10
max_steps: 200
weight_decay: 0.0
bf16: auto
wandb_project:
wandb_entity:
flash_attention: true
gradient_checkpointing: true
evals_per_epoch: 4
special_tokens:
  pad_token: "<|end_of_text|>"
fsdp:
  - full_shard
"""

TRL = """\
model_name_or_path: org/base-0.5b
dataset_name: org/capybara
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
max_length: 2048
packing: true
use_peft: true
lora_r: 16
lora_target_modules: [q_proj, v_proj]
dtype: bfloat16
report_to: [trackio]
push_to_hub: true
eval_strategy: "no"
"""


def write_config(folder: Path, text: str, name: str = "config.yml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_datasets(folder: Path) -> None:
    """Write the files that the LLaMA-Factory config names, below its dataset_dir."""
    (folder / "sets").mkdir()
    (folder / "sets" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    for entry in DATASET_INFO.values():
        if file := entry.get("file_name"):
            (folder / "sets" / str(file)).write_text("")
