"""Plan settings for tests: a test passes what it is about, the rest have plain defaults."""

from typing import Any

from tunesmith.core.types import PlanConfig, PlanReason, PlanValue, split_settings

DEFAULTS: dict[str, Any] = {
    "method": "lora",
    "optim": "adamw",
    "dtype": "bf16",
    "max_length": 512,
    "pack_length": 4096,
    "num_train_epochs": 1,
    "learning_rate": 1e-4,
    "warmup_ratio": 0.0,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "step_in_backward": False,
    "attention": "sdpa",
    "share_prefixes": False,
    "weight_layout": "plain",
    "metrics": ("exact_match",),
    "eval_steps": 10,
    "save_steps": 10,
    "guard_collapse": "rollback",
    "guard_forgetting": "warn",
    "forgetting_margin": 0.02,
    "patience": 3,
    "probe_steps": 0,
    "probe_prompts": 8,
    "gradient_checkpointing": "none",
    "chat_template": "auto",
    "on_overlong": "drop",
    "seed": 0,
    "stage": "sft",
    "output_dir": "runs/run-1",
    "now": "2026-11-26T00:00:00",
}


def make_config(**settings: Any) -> PlanConfig:
    return PlanConfig(**(DEFAULTS | settings))


def make_settings(**settings: PlanValue) -> tuple[PlanConfig, dict[str, PlanReason]]:
    """Return the `config` and `reasons` of a plan that has reasons for these settings only."""
    defaults = {key: PlanValue(value, "rule", "") for key, value in DEFAULTS.items()}
    config, reasons = split_settings(defaults | settings)
    return config, {key: reasons[key] for key in settings}
