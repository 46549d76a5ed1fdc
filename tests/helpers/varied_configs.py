"""The config.json of a family with each value changed alone, as far as it can change what a model
computes, and with keys that other families have.

    list_variants(values)     label -> the values that are changed, the unchanged config first
    list_rotations(...)       ten kinds of rotation, for each kind of layers"""

from collections.abc import Iterator
from math import inf
from typing import Any

Values = dict[str, Any]

# what a forward in evaluation mode does not read, and sizes that only make a model larger
IGNORED_KEYS = {
    *("architectures", "model_type", "transformers_version", "dtype", "_name_or_path"),
    *("id2label", "label2id", "problem_type", "num_labels", "return_dict", "use_cache"),
    *("output_hidden_states", "output_attentions", "output_router_logits", "router_aux_loss_coef"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "initializer_range", "classifier_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "vocab_size"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout"),
    *("embedding_dropout", "linear_a_log_min", "linear_a_log_max", "linear_dt_min"),
    *("linear_dt_max", "linear_dt_init_floor", "time_step_min", "time_step_max"),
    *("time_step_floor", "rescale_prenorm_residual", "num_logits_to_keep", "pretraining_tp"),
}
ROTATION_KEY = "rope_parameters"
# the last two scale the queries of Ministral 3
KEPT_ROTATION_KEYS = {
    *("partial_rotary_factor", "llama_4_scaling_beta", "original_max_position_embeddings")
}
WORDS = {
    "softmax": "sigmoid",
    "sigmoid": "softmax",
    "greedy": "group_limited_greedy",
    "group_limited_greedy": "greedy",
    "average": "sum",
    "sum": "average",
}
LAYERS = ["sliding_attention", "full_attention"]
# keys of some families: a family without them ignores them, or means the same
KEYS_OF_OTHERS: Values = {
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "logit_scale": 0.3,
    "logits_scaling": 2.0,
    "lm_head_multiplier": 0.4,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "query_pre_attn_scalar": 7,
    "sliding_window": 6,
    "use_sliding_window": True,
    "attention_chunk_size": 8,
    "attention_bias": True,
    "mlp_bias": True,
    "use_qk_norm": True,
    "clip_qkv": 0.3,
    "no_rope_layers": [0, 1],
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_theta": 77.0,
    "head_dim": 24,
    "num_key_value_heads": 1,
    "hidden_act": "gelu",
    "rms_norm_eps": 0.1,
    "layer_norm_eps": 0.1,
}
LIMIT = 32  # shorter than one document, so that rotation by length has an effect


def list_variants(values: Values) -> dict[str, Values]:
    """Return label -> the values that are changed."""
    variants: dict[str, Values] = {"as it is": {}}
    for key, value in values.items():
        if key in IGNORED_KEYS:
            continue
        if key == ROTATION_KEY and isinstance(value, dict):
            variants |= _vary_rotation(values, value)
            continue
        for other in _list_others(key, value):
            variants[f"{key}={other}"] = {key: other}
    for key, value in KEYS_OF_OTHERS.items():
        if key not in values:
            variants[f"+{key}={value}"] = {key: value}
    if "layer_types" not in values:
        variants["+layer_types"] = {"layer_types": LAYERS, "sliding_window": 8}
    return variants


def _list_others(key: str, value: Any) -> Iterator[Any]:
    """Yield other values that a config may have."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, float):
        yield value * 0.5 + 0.1
    elif isinstance(value, int) and "window" in key:
        yield from (1, None)
    elif isinstance(value, int):
        # norms of one value and MLPs of one are rounding
        yield from (2 * value,) if key.endswith(("size", "dim", "rank")) else (1, 2 * value)
    elif isinstance(value, str):
        yield from ("gelu", "relu2", "silu") if "act" in key else ()
        if value in WORDS:
            yield WORDS[value]
    elif value is None:
        yield from (True, 2, 0.5)
    elif isinstance(value, list) and value:
        yield from _list_other_lists(value)


def _list_other_lists(value: list[Any]) -> Iterator[list[Any]]:
    """Yield lists with other words or numbers, one for each layer."""
    yield value[::-1]
    for word in dict.fromkeys(map(str, value)):
        if word == str(inf):  # a limit that is none
            continue
        (first, *_) = (x for x in value if str(x) == word)
        yield [first] * len(value)
    if all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        yield [2 * x + 1 for x in value]
    if set(map(str, value)) <= {*LAYERS}:
        yield from ([LAYERS[0]] * len(value), [LAYERS[1]] * len(value))


def _vary_rotation(values: Values, rotation: Values) -> dict[str, Values]:
    """Return other rotations: of all layers, or of one kind of them."""
    variants: dict[str, Values] = {}
    parts = {name: part for name, part in rotation.items() if isinstance(part, dict)}
    for name, part in (parts or {"": rotation}).items():
        for other in list_rotations(values, part):
            changes: Values = {ROTATION_KEY: rotation | {name: other} if name else other}
            if other["rope_type"] == "dynamic":
                changes["max_position_embeddings"] = LIMIT
            variants[f"{name} {other}"] = changes
    if not parts and "layer_types" in values:
        (other, dynamic) = (list_rotations(values, rotation)[index] for index in (1, 2))
        names = dict.fromkeys(values["layer_types"], rotation)
        for label, part in (("linear", other), ("dynamic", dynamic)):
            nested = names | {values["layer_types"][0]: part}
            changes = {ROTATION_KEY: nested, "max_position_embeddings": LIMIT}
            variants[f"nested {label}"] = changes
    return variants


def list_rotations(values: Values, rotation: Values) -> list[Values]:
    """Return rotations of ten kinds, of heads as wide as those of the config."""
    width = values.get("qk_rope_head_dim") or values.get("head_dim")
    width = width or values["hidden_size"] // values["num_attention_heads"]
    half = int(width * rotation.get("partial_rotary_factor", 1)) // 2
    plain: Values = {"rope_type": "default", "rope_theta": rotation.get("rope_theta", 10_000.0)}
    kept = plain | {key: rotation[key] for key in KEPT_ROTATION_KEYS if key in rotation}
    scaled = kept | {"factor": 4.0, "original_max_position_embeddings": 64}
    return [
        kept | {"rope_theta": 50.0},
        kept | {"rope_type": "linear", "factor": 3.0},
        kept | {"rope_type": "dynamic", "factor": 4.0},
        scaled | {"rope_type": "yarn"},
        scaled | {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 16.0},
        scaled | {"rope_type": "yarn", "attention_factor": 0.6, "truncate": False},
        scaled | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        kept
        | {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(half)],
            "long_factor": [2.0 + i for i in range(half)],
            "original_max_position_embeddings": LIMIT,
        },
        plain | {"partial_rotary_factor": 0.5},
        plain | {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    ]
