"""The recipe's keys are frozen: a new one needs a line here, and a test that changing it changes
what a run does."""

from __future__ import annotations

from tunesmith.recipe.schema import ALIASES, KEYS

FROZEN = [
    *("model", "method", "adapter_from", "stage"),
    *(
        "data",
        "eval_data",
        "eval_split",
        "test_data",
        "retention_data",
        "rehearsal",
        "mixture",
        "never",
        "max_examples",
        "skip_invalid",
        "chat_template",
        "chat_template_kwargs",
        "add_tokens",
        "response_schema",
        "group",
    ),
    "train_on",
    *("max_length", "on_overlong", "pack_length", "share_prefixes", "batch_size", "batch_tokens"),
    *("num_train_epochs", "max_steps"),
    *(
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_ratio",
        "optim",
        "weight_decay",
        "max_grad_norm",
    ),
    *("loss", "label_smoothing", "neftune_noise_alpha"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora"),
    "modules_to_save",
    *(
        "dtype",
        "attention",
        "gradient_checkpointing",
        "deterministic",
        "context_parallel_size",
        "dp_shard_size",
        "metrics",
        "gates",
        "guard",
        "save_steps",
        "eval_steps",
        "sweep",
        "seed",
        "output_dir",
    ),
]


def test_no_key_comes_or_goes_unnoticed() -> None:
    assert list(KEYS) == FROZEN
    assert len(FROZEN) <= 60


def test_an_alias_stands_for_a_key_and_is_none() -> None:
    assert set(ALIASES.values()) <= set(FROZEN)
    assert not set(ALIASES) & set(FROZEN)
