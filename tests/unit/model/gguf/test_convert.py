import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tiny_gguf import HEAD_DIM, make_metadata, random_weights, write_gguf
from tunesmith.core.errors import InputError
from tunesmith.model.gguf.convert import convert, estimate_bytes
from tunesmith.model.hub.validate import check_folder

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]


def converted(source: Path) -> Path:
    folder = source.parent / "converted"
    folder.mkdir(exist_ok=True)
    convert(source, folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_as_they_were(make_gguf, architecture: str, tied: bool) -> None:
    source = make_gguf(architecture, tied=tied)
    folder = converted(source)
    check_folder(folder)
    actual, expected = (
        load_file(folder / "model.safetensors"),
        random_weights(architecture, tied=tied),
    )
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name].dtype == torch.bfloat16
        np.testing.assert_array_equal(actual[name].float().numpy(), values, err_msg=name)
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert written <= estimate_bytes(source)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_the_transformers_gguf_loader(make_gguf, architecture: str) -> None:
    source = make_gguf(architecture, quantize="Q8_0")
    ours = AutoModelForCausalLM.from_pretrained(converted(source), dtype=torch.float32)
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    config.head_dim = HEAD_DIM  # which transformers does not read for Qwen3
    config.query_pre_attn_scalar = HEAD_DIM  # nor this for Gemma 3
    stock = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, config=config, dtype=torch.float32
    )
    stock.load_state_dict(
        {name: value.bfloat16().float() for name, value in stock.state_dict().items()}
    )
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, stock(tokens).logits, rtol=0, atol=1e-4)


def test_bfloat16_rounds_as_torch_does(make_gguf) -> None:
    source = make_gguf(quantize="Q4_1")
    folder = converted(source)
    stock = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    for name, values in load_file(folder / "model.safetensors").items():
        assert torch.equal(values, stock.state_dict()[name].bfloat16()), name


def test_stop_tokens_and_template(make_gguf) -> None:
    folder = converted(make_gguf(tokenizer__ggml__eot_token_id=0))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 2}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) == (
        "<|endoftext|>",
        "<|im_start|>",
        "<|endoftext|>",
    )
    text = tokenizer.apply_chat_template([{"content": "he"}], tokenize=False)
    assert text == "<|im_start|>he<|im_end|>\n"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_transformers_takes_the_tokenizer_as_it_stands(make_gguf, architecture: str) -> None:
    cut = "qwen2" if architecture == "qwen2" else "smollm"
    folder = converted(make_gguf(architecture, tokenizer__ggml__pre=cut))
    tokenizer, text = AutoTokenizer.from_pretrained(folder), "\n    12 he <think>"
    assert (
        tokenizer(text)["input_ids"]
        == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    )
    assert tokenizer.tokenize(text)[0] == ("Ċ" if cut == "qwen2" else "ĊĠĠĠĠ")


def test_gemma3_has_the_ids_of_transformers_and_its_windows(make_gguf) -> None:
    source = make_gguf("gemma3")
    folder = converted(source)
    ours = AutoTokenizer.from_pretrained(folder)
    stock = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for text in ("he  he\n", "<|im_start|>he é<think>", "   12 x"):
        assert ours(text)["input_ids"] == stock(text)["input_ids"]
    config = AutoConfig.from_pretrained(folder)
    assert config.sliding_window == 8
    bases = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert bases == {"full_attention": 100000.0, "sliding_attention": 10000.0}


def test_llama3_rope_divisors_become_a_config(tmp_path: Path) -> None:
    theta, factor = 500000.0, 8.0
    config = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config |= {"original_max_position_embeddings": 8192, "rope_theta": theta}
    source = llama3(tmp_path, divisors(config), theta)
    rope = json.loads((converted(source) / "config.json").read_text())["rope_parameters"]
    assert rope == config
    with pytest.raises(InputError, match="not those of Llama 3"):
        converted(llama3(tmp_path, divisors(config) * 1.01 + 0.5, theta))


def divisors(config: dict) -> np.ndarray:
    """Return what llama.cpp stores: the plain frequencies over those that transformers computes for
    `config`."""
    model = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=HEAD_DIM, rope_parameters=config
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model, torch.device("cpu"))
    plain = config["rope_theta"] ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / scaled.numpy()).astype(np.float32)


def llama3(folder: Path, factors: np.ndarray, theta: float) -> Path:
    return write_gguf(
        folder / "llama3.gguf", extra={"rope_freqs.weight": factors}, llama__rope__freq_base=theta
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}},
            "tensors are missing: 7, first blk.0.attn_k.bias",
        ),
        (
            {"extra": {"blk.1.ffn_up.bias": np.ones(96, np.float32)}},
            "tensors are not part of the model: 1, first",
        ),
        ({"general__architecture": "mamba"}, "architecture 'mamba'"),
        (
            {"architecture": "qwen2", "tokenizer__ggml__pre": "llama-bpe"},
            "qwen2 models as 'qwen2', but this file needs",
        ),
        ({"split__count": 3}, "one of 3 parts"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__scaling__type": "yarn"}, "scaling 'yarn'"),
        ({"llama__rope__dimension_count": 8}, "8 of 16"),
        ({"llama__block_count": 3}, "tensors are missing: 9, first blk.2.attn_k"),
        ({"tokenizer__ggml__tokens": ["a"] * 300}, "300 tokens but 266 rows"),
        (
            {"llama__attention__layer_norm_rms_epsilon": float("nan")},
            "epsilon is 'nan', not a valid float",
        ),
        ({"llama__block_count": 10**6}, "block_count is 1,000,000, but there are"),
        (
            {"llama__feed_forward_length": 95},
            r"ffn_gate.weight is \[96, 64\], the config says",
        ),
        ({"llama__feed_forward_length": None}, "no llama.feed_forward_length"),
        ({"tokenizer__ggml__eos_token_id": 10**6}, "eos_token_id 1000000 is outside"),
        (
            {"extra": {"blk.0.ssm_in.weight": np.ones((2, 2), np.float32)}},
            "not part of the model: 1, first blk.0.ssm_in",
        ),
        ({"bad": "model.layers.1.mlp.up_proj.weight"}, "blk.1.ffn_up.weight holds NaN"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(
    make_gguf, changed: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        converted(make_gguf(**changed))


VALUES = ["x", "", 0, 2**31, 2.5, float("nan"), True, ["x"], [1, 2]]


@pytest.mark.parametrize("key", sorted(make_metadata("llama")))
def test_metadata_of_a_wrong_kind_raises_nothing_but_input_errors(make_gguf, key: str) -> None:
    refused = 0
    for value in VALUES:
        try:
            converted(make_gguf(**{key: value}))
        except InputError:
            refused += 1
    assert refused > 0 or key in ("general.name", "tokenizer.chat_template")
