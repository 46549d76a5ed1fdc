"""Reasons for keys of other tools that a recipe does not have, by patterns of names.

UNNEEDED_KEYS change nothing here, or always apply. UNSUPPORTED_KEYS may change what is trained, or
whether it fits. Empty and false keys are skipped silently, since they ask for nothing."""

from __future__ import annotations

from collections.abc import Container
from fnmatch import fnmatchcase

from tunesmith.recipe.importers.draft import RecipeDraft

UNNEEDED_KEYS = (
    (
        "*packing* pad_* group_by_length batch_flattening multipack_* padding_free eval_packing",
        "always on: documents are packed without cross-document attention",
    ),
    (
        "wandb_* mlflow_* comet_* swanlab_* use_swanlab trackio_* otel_* report_to run_name log* "
        "plot_loss project use_tensorboard include_* disable_tqdm",
        "every step is in the run's events.jsonl; `tunesmith report RUN --track NAME` sends it",
    ),
    (
        "hub_* push_to_hub* hf_* *_hub_token push_dataset_to_hub",
        "upload a finished run: tunesmith export RUN --to hub",
    ),
    (
        "gradient_checkpointing* *_gradient_checkpointing use_reentrant_gc use_unsloth_gc "
        "activation_offloading low_cpu_mem_usage max_memory gpu_memory_limit gc_* "
        "torch_empty_cache_steps auto_find_batch_size tiled_mlp*",
        "the plan fits the memory",
    ),
    (
        "flash_* attn_implementation xformers_attention sdp_attention flex_* sage_attention "
        "eager_attention *liger* use_unsloth lora_*_kernel *_kernels torch_compile* "
        "cut_cross_entropy chunked_cross_entropy* tf32 use_cache upcast_* *autocast*",
        "the fastest verified kernels are used",
    ),
    (
        "preprocessing_* overwrite_cache *_num_workers *_num_proc *_processes "
        "dataset_prepared_path dataloader_pin_memory dataloader_prefetch_factor "
        "dataloader_persistent_workers cache_dir remove_unused_columns "
        "dataset_keep_in_memory streaming* buffer_size data_shared_file_system "
        "skip_prepare_dataset",
        "rows are read from their file when they are needed",
    ),
    ("overwrite_output_dir", "a run folder is never overwritten"),
    (
        "resume_from_checkpoint auto_resume_from_checkpoints",
        "`tunesmith resume RUN` resumes a run",
    ),
    ("trust_remote_code", "code from a model folder is never run"),
    (
        "model_type tokenizer_type tokenizer_use_fast use_fast_tokenizer is_*_derived_model "
        "processor_type model_name",
        "read from the model's files",
    ),
    ("*eval_batch_size", "follows from the memory"),
    (
        "do_train do_eval do_predict predict_with_generate eval_on_start metric_for_best_model "
        "greater_is_better",
        "a run always measures before and after",
    ),
    (
        "save_total_limit save_only_model save_safetensors save_first_step",
        "the newest two checkpoints are retained",
    ),
    ("shuffle_*", "every epoch is shuffled by the seed"),
    ("ddp_*", "processes sum their gradients without torch's DDP"),
    ("strict", "unknown keys are always refused"),
)

UNSUPPORTED_KEYS = (
    (
        "load_in_* quantization_* double_quantization bnb_* gptq loftq_* use_bnb* qlora_*",
        "frozen weights are in 16 bits, or in NF4 with method: qlora",
    ),
    (
        "deepspeed* deepcompile fsdp* ray_* use_ray *_parallel* accelerator_config device_map "
        "local_rank world_size dp_* num_processes master_*",
        "`train --gpus N` or torchrun starts processes, and dp_shard_size divides the weights",
    ),
    (
        "pissa_* loraplus_* *_pattern peft_* lora_target_parameters relora* use_llama_pro "
        "create_new_adapter init_lora_weights freeze_* unfrozen_parameters",
        "only LoRA, rsLoRA, DoRA and full training are supported",
    ),
    (
        "lora_modules_to_save additional_target modules_to_save",
        "full training trains every module",
    ),
    (
        "special_tokens added_tokens_overrides add_special_tokens new_special_tokens_config "
        "resize_* added_tokens eot_tokens eos_token",
        "set add_tokens for new tokens; end tokens come from the chat template",
    ),
    ("mask_history", 'put "train": false on answers that should not be trained'),
    (
        "early_stopping_* load_best_model_at_end",
        "the best checkpoint is chosen on eval_data; set guard: {patience: ...} to stop early",
    ),
    ("loss_watchdog_*", "set guard: {collapse: stop}, which acts on collapsing answers"),
    (
        "adam_* optim_* cosine_* embedding_lr* lr_groups",
        "AdamW with its usual betas, and a plain schedule",
    ),
    ("plugins custom_* trainer_cls", "external code is not run"),
    ("dataloader_drop_last", "the last batch of an epoch is trained, too"),
    ("tokenized_path", "the rows saved there are not read: set `data` to their files"),
    ("dataset_exact_deduplication", "`tunesmith data check` counts duplicates; none is removed"),
    ("dataset_shard_*", "a shard is a part of the rows: write it to a file of its own"),
    ("rope_scaling", "set it in the model's config.json"),
)

SECRET_PATTERNS = "*token *api_key *secret* *password*"


def skip_remaining_keys(draft: RecipeDraft, on_by_default: Container[str]) -> None:
    """Record a reason for every key that no importer has taken; secrets are not repeated.

    A key that is off asks for nothing, unless it is on by default."""
    for key, value in list(draft.remaining.items()):
        draft.pop_value(key)
        if value in (None, False, "", 0, [], {}) and key not in on_by_default:
            continue
        if _is_match(key, SECRET_PATTERNS):
            value = "..."
        if reason := _find_reason(key, UNNEEDED_KEYS):
            draft.skip_key(key, value, reason, is_important=False)
        else:
            reason = _find_reason(key, UNSUPPORTED_KEYS) or "a recipe has no such key"
            draft.skip_key(key, value, reason)


def _find_reason(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for patterns, reason in table:
        if _is_match(key, patterns):
            return reason
    return ""


def _is_match(key: str, patterns: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns.split())
