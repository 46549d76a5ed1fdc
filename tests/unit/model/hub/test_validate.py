import json
import pickle
import random
import socket
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tiny_gguf import CONFIG
from tunesmith.core.errors import InputError
from tunesmith.model.hub.validate import check_folder, read_header, read_headers


class Evil:
    """An object that writes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.sentinel, "executed")


def test_a_folder_needs_its_weights(model_folder: Path) -> None:
    check_folder(model_folder)
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(InputError):
        check_folder(model_folder)


@pytest.mark.parametrize(
    ("file", "content", "key"),
    [
        (
            "config.json",
            {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Model"}},
            "auto_map",
        ),
        (
            "config.json",
            {"model_type": ["evil"], "auto_map": {"AutoConfig": "someone/else--evil.Config"}},
            "auto_map",
        ),
        ("config.json", {"auto_map": {"AutoModel": "a.B", "AutoTokenizer": "a.C"}}, "auto_map"),
        ("config.json", {"auto_map": {"AutoModel": ["evil.Model"]}}, "auto_map"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}}, "auto_map"),
        (
            "config.json",
            {"_attn_implementation_internal": "someone/kernel"},
            "_attn_implementation_internal",
        ),
        ("config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ("config.json", {"experts_implementation": "someone/kernel"}, "experts_implementation"),
        (
            "config.json",
            {"text_config": {"parts": [{"_attn_implementation": {"": "x/y"}}]}},
            "_attn_implementation",
        ),
        ("config.json", {"vision": {"trust_remote_code": True}}, "trust_remote_code"),
        ("config.json", {"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
        ("config.json", {"custom": {"class": "evil.Model"}}, "refers to a Python file"),
        ("config.json", {"custom": "someone/else--evil.py"}, "refers to a Python file"),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
            "auto_map",
        ),
        ("generation_config.json", {"trust_remote_code": 1}, "trust_remote_code"),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.P"}}, "auto_map"),
    ],
)
def test_fault_16_remote_code_is_refused_and_never_runs(
    model_folder: Path, file: str, content: dict, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentinel = model_folder / "executed"
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("no socket is opened"))
    (model_folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w').close()")
    (model_folder / file).write_text(
        json.dumps((CONFIG if file == "config.json" else {}) | content)
    )
    with pytest.raises(InputError, match=key) as caught:
        check_folder(model_folder)
    assert file in caught.value.where
    assert not sentinel.exists()
    assert "evil" not in sys.modules


def test_fault_16_code_that_transformers_has_itself_is_left_out_and_never_runs(
    model_folder: Path, change_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repositories of Phi-4 mini, DeepSeek and Nemotron name such code for older versions."""
    from tunesmith.model.causal_lm import load_network
    from tunesmith.model.hub.text_class import load_text_config
    from tunesmith.model.save import save_config

    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("no socket is opened"))
    sentinel = model_folder / "executed"
    (model_folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w').close()")
    for prefix in ("", "someone/else--"):
        names = {name: f"{prefix}evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
        change_config(auto_map=names)
        check_folder(model_folder)
        config = load_text_config(model_folder)
        network = load_network(model_folder, torch.float32)
        assert not hasattr(config, "auto_map")
        for part in (config, network):
            assert type(part).__module__.startswith("transformers.models.llama.")
    target = model_folder / "merged"
    target.mkdir()
    save_config(target, model_folder, config.vocab_size, is_packed=False)
    assert "auto_map" not in (target / "config.json").read_text()
    assert not sentinel.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "tokenizer_config.json",
            {"vocab_file": "/etc/passwd"},
            "the key vocab_file names a file outside",
        ),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "EvilTokenizer"},
            "tokenizer_class is 'EvilTokenizer'",
        ),
        ("tokenizer_config.json", {"tokenizer_class": ["os", "system"]}, "tokenizer_class is"),
        ("tokenizer_config.json", {"init_inputs": ["x"]}, "init_inputs"),
        (
            "config.json",
            {"per_layer_config": {"0": {"hidden_size": 9}}},
            "the key per_layer_config makes",
        ),
        (
            "config.json",
            {"compression_config": {"format": "x"}},
            "the key compression_config makes",
        ),
        (
            "config.json",
            {"model_type": "x", "auto_map": {"AutoModel": "x.y"}},
            "auto_map makes transformers load",
        ),
    ],
)
def test_keys_that_lead_elsewhere_are_refused(
    model_folder: Path, file: str, content: dict, message: str
) -> None:
    (model_folder / file).write_text(
        json.dumps((CONFIG if file == "config.json" else {}) | content)
    )
    with pytest.raises(InputError, match=message):
        check_folder(model_folder)


def test_custom_generation_code_is_refused(model_folder: Path) -> None:
    (model_folder / "custom_generate").mkdir()
    (model_folder / "custom_generate" / "generate.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match="brings its own code for generate"):
        check_folder(model_folder)


def test_harmless_keys_pass(change_config) -> None:
    check_folder(
        change_config(_attn_implementation_autoset=True, trust_remote_code=False, auto_map=None)
    )
    with pytest.raises(InputError, match="trust_remote_code"):
        check_folder(
            change_config(_attn_implementation_autoset=True, trust_remote_code=True, auto_map=None)
        )


def test_fault_15_only_pickled_weights_are_refused_and_not_opened(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    sentinel = model_folder / "executed"
    for name in ("pytorch_model.bin", "consolidated.pt", "last.ckpt"):
        (model_folder / name).write_bytes(pickle.dumps(Evil(sentinel)))
        with pytest.raises(InputError, match=rf"only pickled weights \({name}\)") as caught:
            check_folder(model_folder)
        assert "save_pretrained" in caught.value.fix
        (model_folder / name).unlink()
    assert not sentinel.exists()


def test_a_pickle_beside_safetensors_does_not_matter(model_folder: Path) -> None:
    sentinel = model_folder / "executed"
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(sentinel)))
    check_folder(model_folder)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no config.json"),
        (b"{'model_type': 1}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_config_is_named(model_folder: Path, content: bytes | None, message: str) -> None:
    (model_folder / "config.json").unlink()
    if content is not None:
        (model_folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_folder(model_folder)


def test_other_folders_get_advice(model_folder: Path) -> None:
    (model_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="an adapter, not a model"):
        check_folder(model_folder)
    (model_folder / "adapter_config.json").unlink()
    (model_folder / "model.safetensors").rename(model_folder / "model.gguf")
    with pytest.raises(InputError, match="the folder holds a GGUF") as caught:
        check_folder(model_folder)
    assert caught.value.fix.endswith("model.gguf")
    (model_folder / "model.gguf").unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        check_folder(model_folder)


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 16)}, "invalid offset for tensor `b`"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, "invalid offset for tensor `b`"),
        ({"a": entry(0, 16), "b": entry(16, 32)}, "file not fully covered"),
        ({"a": entry(0, 8)}, "file not fully covered"),
        ({"a": entry(0, 16, [3])}, "invalid shape, data type, or offset for tensor"),
        ({"a": entry(0, 16, [-2, -2])}, "integer `-2`, expected usize"),
        ({"a": entry(0, 16, [2.0, 2])}, "floating point `2.0`, expected usize"),
        ({"a": entry(0, 16, dtype="F31")}, "unknown variant `F31`"),
        ({"a": entry(0, 16, [32], "F4")}, "the tensor a has the unsupported type F4"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "missing field `data_offsets`"),
        ({"a": entry(16, 0)}, "integer `-4`, expected usize"),
        ({"a": [1]}, "integer `1`, expected string or map"),
        ([], "invalid type: sequence"),
    ],
)
def test_fault_19_an_inconsistent_header_names_the_file(
    tmp_path: Path, header: object, message: str
) -> None:
    raw = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", (2**60).to_bytes(8, "little") + b"{}", bytes(8)]
)
def test_no_header_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(InputError):
        read_header(tmp_path / "bad.safetensors")


def test_a_pointer_of_git_lfs_is_no_damaged_file(tmp_path: Path) -> None:
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    with pytest.raises(InputError, match="a pointer of Git LFS instead of the weights") as caught:
        read_header(pointer)
    assert "git lfs pull" in caught.value.fix


def test_fault_19_a_header_of_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write((100 * 10**6).to_bytes(8, "little"))
        file.truncate(200 * 10**6)
    tracemalloc.start()
    with pytest.raises(
        InputError, match="a header of 100,000,000 bytes is over the limit of 4,194,304"
    ):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_repeated_tensor(tmp_path: Path) -> None:
    tensor = b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    raw = b"{" + tensor + b"," + tensor + b"}"
    (tmp_path / "bad.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(InputError, match="the key a is repeated"):
        read_header(tmp_path / "bad.safetensors")


def test_what_passes_here_passes_in_safetensors(tmp_path: Path) -> None:
    save_file(
        {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)},
        tmp_path / "good.safetensors",
    )
    content = (tmp_path / "good.safetensors").read_bytes()
    chance, path, passed = random.Random(0), tmp_path / "damaged.safetensors", 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] = chance.choice(b'0123456789{}[]:,"ab\x00\xff')
        path.write_bytes(damaged[: len(content) - chance.choice([0, 0, 0, 1])])
        try:
            ours = read_header(path)
        except InputError:
            continue
        passed += 1
        try:
            with safe_open(path, "numpy") as file:
                assert set(file.keys()) == set(ours)
        except SafetensorError as error:
            pytest.fail(f"safetensors refuses what passed: {error}: {bytes(damaged)!r}")
    assert passed > 40


def sharded(folder: Path, **changed: str) -> Path:
    (folder / "model.safetensors").unlink()
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "two.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors"} | changed
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_shards(model_folder: Path) -> None:
    headers = read_headers(sharded(model_folder))
    assert {name: (tensor.file.name, tensor.shape) for name, tensor in headers.items()} == {
        "a": ("one.safetensors", (2,)),
        "b": ("two.safetensors", (3,)),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": "../one.safetensors"}, "not to a safetensors file in the same folder"),
        ({"a": "/etc/passwd"}, "not to a safetensors file in the same folder"),
        ({"a": "model.bin"}, "not to a safetensors file in the same folder"),
        ({"a": "three.safetensors"}, "the file is missing"),
        ({"c": "two.safetensors"}, r"two\.safetensors has no tensor c"),
    ],
)
def test_a_bad_index_is_refused(model_folder: Path, changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_folder(sharded(model_folder, **changed))
