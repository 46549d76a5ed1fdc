import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig

from tiny_export import CHATML, SYSTEM, make_export_job, save_model, save_tokenizer
from tunesmith.core.errors import InputError
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.export.gguf import PROBE_TEXT, build_architecture, build_vocabulary
from tunesmith.export.source_run import SourceRun
from tunesmith.model.gguf.reader import GgufFile
from tunesmith.model.gguf.tokenizer import PRE_TOKENIZERS, build_tokenizer, find_special_token
from tunesmith.model.hub.spec import read_spec
from tunesmith.model.reference_load import load_config_dict

NOW = datetime(2026, 1, 2)


def metadata_of(folder: Path, size: int = 0) -> dict[str, Any]:
    tokens = len(AutoTokenizer.from_pretrained(folder))
    return build_vocabulary(folder, Renderer.from_folder(folder, now=NOW), size or tokens)


@pytest.mark.parametrize("cut", sorted(PRE_TOKENIZERS))
def test_the_cut_is_found_by_what_it_does(tmp_path: Path, cut: str) -> None:
    save_tokenizer(tmp_path, cut)
    metadata = metadata_of(tmp_path)
    assert metadata["tokenizer.ggml.pre"] == cut
    original = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = PROBE_TEXT + "<|im_start|>sum and 1 <think> sample</think><|im_end|>"
    assert (
        build_tokenizer(GgufFile(tmp_path, metadata, ())).encode(text).ids
        == original.encode(text).ids
    )


def test_the_probe_tells_all_known_cuts_apart() -> None:
    cuts = set()
    for pre_tokenizer in PRE_TOKENIZERS.values():
        cuts.add(tuple(piece for piece, _ in pre_tokenizer.pre_tokenize_str(PROBE_TEXT)))
    assert len(cuts) == len(PRE_TOKENIZERS)


def test_special_tokens_kinds_and_templates(finished: Path, tmp_path: Path) -> None:
    run: SourceRun = make_export_job(finished, tmp_path).run
    size = run.model_spec.vocab_size
    metadata = build_vocabulary(run.saved_dir, run.renderer, size)
    file = GgufFile(tmp_path, metadata, ())
    assert find_special_token(file, "eos") == "<|im_end|>"  # what answers were trained to end with
    assert find_special_token(file, "eot") == "<|text|>"  # what texts end with
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (len(tokens), len(kinds)) == (size, size)
    assert [
        kinds[tokens.index(text)] for text in ("<|im_end|>", "<think>", "sum", f"[PAD{size - 1}]")
    ] == [3, 4, 1, 5]
    assert metadata["tokenizer.chat_template"] == CHATML
    assert SYSTEM in metadata["tokenizer.chat_template"]
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def changed_tokenizer(folder: Path, **parts: Any) -> Path:
    save_tokenizer(folder, "smollm")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return folder


def json_of(part: Any) -> Any:
    return json.loads(part.__getstate__())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {
                "pre_tokenizer": json_of(
                    pre_tokenizers.Sequence(
                        [
                            pre_tokenizers.Digits(individual_digits=False),
                            pre_tokenizers.ByteLevel(add_prefix_space=False),
                        ]
                    )
                )
            },
            "unsupported pre-tokenizer",
        ),
        ({"normalizer": json_of(normalizers.NFKC())}, "unsupported pre-tokenizer"),
        (
            {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
            "only byte-level BPE tokenizers",
        ),
    ],
)
def test_tokenizers_that_no_gguf_here_can_say(
    tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    save_tokenizer(tmp_path, "smollm")
    renderer = Renderer.from_folder(tmp_path, now=NOW)
    changed_tokenizer(tmp_path, **parts)
    with pytest.raises(InputError, match=message):
        build_vocabulary(tmp_path, renderer, 300)


def test_a_token_that_eats_spaces_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "smollm")
    renderer = Renderer.from_folder(tmp_path, now=NOW)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    changed_tokenizer(tmp_path, added_tokens=[token | {"rstrip": True} for token in added])
    with pytest.raises(InputError, match=r"cannot express how .* strips the text around it"):
        build_vocabulary(tmp_path, renderer, 300)


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "cannot express this model's hidden_act"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding window",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "with RoPE",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "with RoPE",
        ),
    ],
)
def test_models_that_no_gguf_here_can_say(
    tmp_path: Path, family: str, changed: dict[str, Any], message: str
) -> None:
    folder = save_model(tmp_path, family, **changed)
    with pytest.raises(InputError, match=message):
        build_architecture(load_config_dict(folder), read_spec(folder))


def test_families_without_a_gguf_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    )
    with pytest.raises(
        InputError, match="cannot write a GGUF of mistral; supported: llama, qwen2, qwen3"
    ) as caught:
        build_architecture(load_config_dict(folder), read_spec(folder))
    assert "merged or peft" in caught.value.fix


def test_linear_rope(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}
    folder = save_model(tmp_path, rope_parameters=rope)
    fields, factors = build_architecture(
        LlamaConfig.from_pretrained(folder).to_dict(), read_spec(folder)
    )
    assert factors is None
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == (
        "linear",
        4.0,
    )
    assert fields["llama.rope.freq_base"] == 5e4
