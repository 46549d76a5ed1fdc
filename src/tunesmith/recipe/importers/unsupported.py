"""Keys of the other tools that a recipe does not have, and why: patterns of names with a reason.

NEEDLESS changes nothing here, or is always so. LATER may change what is trained, or whether it
fits. A key that is empty or false is skipped without a word: it asks for nothing."""

from __future__ import annotations

from fnmatch import fnmatchcase

from tunesmith.recipe.importers.draft import RecipeDraft

UNNEEDED_KEYS = (
    (
        "*packing* pad_* group_by_length batch_flattening multipack_* padding_free eval_packing",
        "always on: documents are packed exactly, and never see each other",
    ),
    (
        "wandb_* mlflow_* comet_* swanlab_* use_swanlab trackio_* otel_* report_to run_name log* plot_loss project "
        "use_tensorboard include_* disable_tqdm",
        "every step is in the run's events.jsonl; nothing is sent anywhere",
    ),
    ("hub_* push_to_hub* hf_* *_hub_token push_dataset_to_hub", "nothing is uploaded"),
    (
        "gradient_checkpointing* *_gradient_checkpointing use_reentrant_gc use_unsloth_gc activation_offloading "
        "low_cpu_mem_usage max_memory gpu_memory_limit gc_* torch_empty_cache_steps auto_find_batch_size tiled_mlp*",
        "the plan fits the memory",
    ),
    (
        "flash_* attn_implementation xformers_attention sdp_attention flex_* sage_attention eager_attention *liger* "
        "use_unsloth lora_*_kernel *_kernels torch_compile* cut_cross_entropy chunked_cross_entropy* tf32 use_cache "
        "upcast_* *autocast*",
        "the fastest kernels that are proven equal are picked",
    ),
    (
        "preprocessing_* overwrite_cache *_num_workers *_num_proc *_processes dataset_prepared_path dataloader_* "
        "tokenized_path cache_dir remove_unused_columns dataset_keep_in_memory streaming* buffer_size "
        "data_shared_file_system skip_prepare_dataset dataset_shard_*",
        "rows are read from their file when they are needed",
    ),
    ("overwrite_output_dir", "a run folder is never overwritten"),
    (
        "resume_from_checkpoint auto_resume_from_checkpoints",
        "`tunesmith resume RUN` goes on with a run",
    ),
    ("trust_remote_code", "code from a model folder is never run"),
    (
        "model_type tokenizer_type tokenizer_use_fast use_fast_tokenizer is_*_derived_model processor_type model_name",
        "the model's own files say so",
    ),
    ("assistant_only_loss completion_only_loss", "always on: only answers are trained"),
    ("*eval_batch_size", "follows from the memory"),
    (
        "do_train do_eval do_predict predict_with_generate eval_on_start metric_for_best_model greater_is_better",
        "a run measures before and after by itself",
    ),
    (
        "save_total_limit save_only_model save_safetensors save_first_step",
        "the newest two checkpoints are kept",
    ),
    ("shuffle_*", "each epoch has an order of its own, fixed by the seed"),
    ("ddp_*", "one process on one device so far"),
    ("strict", "unknown keys are always refused"),
)

UNSUPPORTED_KEYS = (
    (
        "load_in_* quantization_* double_quantization bnb_* gptq loftq_* use_bnb* qlora_*",
        "frozen weights are kept in 16 bits, or in NF4 with method: qlora",
    ),
    (
        "deepspeed* deepcompile fsdp* ray_* use_ray *_parallel* accelerator_config device_map local_rank world_size "
        "dp_* num_processes master_*",
        "one process on one device so far",
    ),
    (
        "pissa_* loraplus_* *_pattern peft_* lora_target_parameters relora* use_llama_pro "
        "create_new_adapter init_lora_weights freeze_* unfrozen_parameters",
        "only LoRA, rsLoRA, DoRA and full training so far",
    ),
    (
        "lora_modules_to_save additional_target modules_to_save",
        "only adapters are trained, no whole modules",
    ),
    (
        "special_tokens added_tokens_overrides add_special_tokens new_special_tokens_config resize_* added_tokens "
        "eot_tokens eos_token",
        "set add_tokens for new tokens; end tokens come from the chat template",
    ),
    ("train_on_inputs train_on_prompt", "answers are trained, prompts are not"),
    ("mask_history", 'put "train": false on the answers that are not to be trained'),
    ("early_stopping_* load_best_model_at_end loss_watchdog_*", "no run is stopped early yet"),
    ("neftune_* noisy_embedding_alpha", "no noise is added to embeddings"),
    (
        "adam_* optim_* lr_scheduler_kwargs cosine_* embedding_lr* lr_groups",
        "AdamW with its usual betas, and a plain schedule",
    ),
    ("plugins custom_* trainer_cls", "no code from outside is run"),
    ("dataset_exact_deduplication", "`tunesmith data check` counts duplicates; none is removed"),
    ("rope_scaling", "set it in the model's config.json"),
)


SECRET_PATTERNS = "*token *api_key *secret* *password*"


def skip_remaining_keys(draft: RecipeDraft) -> None:
    """Says of every key that nothing has taken why the recipe does not have it."""
    for key, value in list(draft.remaining.items()):
        draft.pop_value(key)
        if value in (None, False, "", 0, [], {}):
            continue
        if _is_match(key, SECRET_PATTERNS):
            value = "..."
        for table, is_important in ((UNNEEDED_KEYS, False), (UNSUPPORTED_KEYS, True)):
            if reason := _find_reason(key, table):
                draft.skip_key(key, value, reason, is_important=is_important)
                break
        else:
            draft.skip_key(key, value, "a recipe has nothing like it")


def _find_reason(key: str, table: tuple[tuple[str, str], ...]) -> str:
    return next((reason for patterns, reason in table if _is_match(key, patterns)), "")


def _is_match(key: str, patterns: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns.split())
