"""`tunesmith export`, from a finished run to a folder that others load; and what it refuses."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tiny_export import CHATML, make_export_job, save_model, save_run
from tiny_runs import make_chat_row, make_tiny_recipe, write_rows
from tunesmith.cli import app
from tunesmith.core.atomic import hash_file, read_manifest, verify_dir
from tunesmith.core.errors import GateError, InputError, MachineError
from tunesmith.core.events import CheckResult
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.export.export import (
    TARGETS,
    ExportResult,
    export_run,
)
from tunesmith.export.hf import write_merged_folder
from tunesmith.export.parity import ExportJob, Tolerance, compute_live_outputs
from tunesmith.export.request import TARGET_TYPES
from tunesmith.model.causal_lm import compute_stock_logits, load_network
from tunesmith.model.gguf.reader import read_gguf
from tunesmith.session import inputs, planner

END = "<|im_end|>"


@pytest.fixture(scope="module")
def exports(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportResult]:
    """Every target in every type, by the names of their folders; of Ollama's, one."""
    folder = tmp_path_factory.mktemp("exports")
    result: dict[str, ExportResult] = {}
    for name in FILES:
        target, _, kind = name.partition("-")
        result[name] = export_run(finished, target, kind=kind or None, out=folder / name)
    return result


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


FILES = {
    "peft": {"adapter_config.json", "adapter_model.safetensors"},
    "merged": {"config.json", "model.safetensors"},
    **{f"gguf-{kind}": {f"model-{kind}.gguf"} for kind in ("f16", "q8_0", "bf16", "f32")},
    "ollama-q8_0": {"model-q8_0.gguf", "Modelfile"},
}
SERVING = {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
}


@pytest.mark.promise
@pytest.mark.parametrize("name", FILES)
def test_what_is_in_each_folder(name: str, exports: dict[str, ExportResult]) -> None:
    made = exports[name]
    folder = Path(made.path)
    assert verify_dir(folder) == ""
    assert {file.name for file in made.files} >= FILES[name] | (
        SERVING if name in ("peft", "merged") else set()
    )
    assert {path.name for path in folder.iterdir()} == {file.name for file in made.files} | {
        "manifest.json"
    }
    for file in made.files:
        assert (file.bytes, file.sha256) == (
            (folder / file.name).stat().st_size,
            hash_file(folder / file.name),
        )
    assert made.parity.same_prompts == made.parity.rendered_prompts == made.parity.prompts == 4
    assert not list(folder.parent.glob(".t*"))


def test_how_near_each_is(exports: dict[str, ExportResult]) -> None:
    kl = {name: made.parity.mean_kl for name, made in exports.items()}
    assert max(kl["peft"], kl["gguf-f32"]) < 1e-9
    assert kl["gguf-f32"] < kl["gguf-f16"] < kl["merged"] == kl["gguf-bf16"] < kl["gguf-q8_0"]
    assert kl["ollama-q8_0"] == kl["gguf-q8_0"]
    assert all(made.parity.trained_kl > 100 * kl[name] for name, made in exports.items())


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's
def test_transformers_runs_the_merged_folder_without_anything_else(
    exports: dict[str, ExportResult], finished: Path
) -> None:
    folder = exports["merged"].path
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.convert_tokens_to_ids(END) == ends[0]
    assert tokenizer.chat_template == CHATML
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((finished / "plan.json").read_text())["model"]["path"]
    )
    adapted = PeftModel.from_pretrained(base.float(), finished / "adapter").eval()
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": "5 and 15 please"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        torch.testing.assert_close(
            network(**tokens).logits, adapted(**tokens).logits, atol=0.1, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "difference"), [("merged", 0.1), ("gguf-f16", 0.1), ("ollama-q8_0", 0.6)]
)
def test_it_is_a_model_for_the_next_run(
    name: str, difference: float, exports: dict[str, ExportResult], finished: Path, tmp_path: Path
) -> None:
    """`model:` takes it: the same ids, the same end, nearly the same logits. Our converter rounds a
    GGUF to bf16."""
    job = make_export_job(finished, tmp_path / "job")
    folder = Path(exports[name].path)
    model = next(folder.glob("*.gguf"), folder)
    run_inputs = inputs.load_inputs(
        make_tiny_recipe(model, tmp_path, data=str(finished.parent / "test.jsonl"))
    )
    for witness in job.examples:
        assert run_inputs.renderer.encode_prompt(witness.messages) == witness.rendered_ids
    assert run_inputs.renderer.end_ids == job.run.renderer.end_ids
    assert planner.make_plan(run_inputs).config.method == "lora"
    network = load_network(run_inputs.model.path, torch.float32)
    for witness, live in zip(job.examples, compute_live_outputs(job).logits, strict=True):
        logits = compute_stock_logits(
            network, witness.document.tokens_L[:-1].tolist(), witness.positions
        )
        assert float((logits - live).abs().max()) < difference


@pytest.mark.promise
def test_dora_is_in_the_weights_or_beside_them(dora_run: Path, tmp_path: Path) -> None:
    merged, peft, gguf = (
        export_run(dora_run, target, out=tmp_path / target) for target in ("merged", "peft", "gguf")
    )
    assert peft.parity.mean_kl < 1e-9 < merged.parity.mean_kl
    assert gguf.parity.trained_kl > 100 * max(merged.parity.mean_kl, gguf.parity.mean_kl)
    assert not (dora_run / "export").exists()


def test_the_gguf_says_what_it_is(exports: dict[str, ExportResult]) -> None:
    metadata = read_gguf(Path(exports["gguf-q8_0"].path) / "model-q8_0.gguf").metadata
    assert metadata["general.type"] == "model"
    assert metadata["general.file_type"] == 7
    assert metadata["general.name"] == "tiny run"


def test_a_manifest_names_the_origin(exports: dict[str, ExportResult]) -> None:
    assert "trained by tunesmith" in read_manifest(Path(exports["merged"].path))["origin"]


# ---------------------------------------------------------------- places


def test_by_default_it_goes_into_the_run_folder(run_copy: Path) -> None:
    assert Path(export_run(run_copy, "peft").path) == run_copy / "export" / "peft"
    assert Path(export_run(run_copy, "gguf", kind="f32").path) == run_copy / "export" / "gguf-f32"
    with pytest.raises(InputError, match="the output folder already exists") as refusal:
        export_run(run_copy, "peft")
    assert "--out" in refusal.value.fix


def test_a_folder_with_content_is_not_touched_and_an_empty_one_is_taken(
    finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    assert export_run(finished, "peft", out=tmp_path / "mine").files
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for folder in (tmp_path / "other", tmp_path / "other" / "thesis.txt"):
        with pytest.raises(InputError, match="the output folder already exists"):
            export_run(finished, "peft", out=folder)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_nothing_is_left_when_the_gate_says_no(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = dataclasses.replace(TARGETS["merged"][""], tolerance=Tolerance(mean_kl=0, max_kl=0))
    monkeypatch.setitem(TARGETS["merged"], "", strict)
    with pytest.raises(GateError, match="does not behave as the run"):
        export_run(finished, "merged", out=tmp_path / "deep" / "merged")
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_export_that_cannot_be_read_back(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(job: ExportJob) -> None:
        write_merged_folder(job)
        os.truncate(job.folder / "model.safetensors", 1000)

    monkeypatch.setitem(
        TARGETS["merged"], "", dataclasses.replace(TARGETS["merged"][""], write=torn)
    )
    with pytest.raises(GateError, match="cannot be read back: damaged"):
        export_run(finished, "merged", out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_no_room_on_the_disk_is_said_first(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(MachineError, match="no space left on the disk") as refusal:
        export_run(finished, "merged", out=tmp_path / "merged")
    assert "set --out to another disk" in refusal.value.fix
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        ("gguff", None, "unknown export target 'gguff'\n  fix: did you mean gguf"),
        (
            "onnx",
            None,
            "unknown export target 'onnx'\n  fix: use one of peft, merged, gguf, ollama",
        ),
        (
            "gguf",
            "q4_k_m",
            "gguf has no type 'q4_k_m'\n  fix: use one of f16, q8_0, bf16, f32",
        ),
        ("merged", "f16", "merged has no type 'f16'\n  fix: leave --type out"),
        ("peft", "per-expert", "peft has no type 'per-expert'\n  fix: use --to merged"),
        ("gguf", "lora", "gguf has no type 'lora'\n  fix: use --to gguf, or llama.cpp's"),
    ],
)
def test_unknown_words(finished: Path, target: str, kind: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_run(finished, target, kind=kind)


def test_the_names_are_those_of_the_formats() -> None:
    assert {target: tuple(formats) for target, formats in TARGETS.items()} == TARGET_TYPES


def test_a_type_is_refused_where_it_has_no_effect(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(["export", str(finished), "--to", "vllm", "--type", "q8_0"])
    assert ended.value.code == 2
    assert "vllm has no type 'q8_0'\n  fix: leave --type out" in capsys.readouterr().err


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        export_run(tmp_path / "nowhere", "peft")


def test_an_unfinished_run(run_copy: Path) -> None:
    (run_copy / "record.json").unlink()
    with pytest.raises(InputError, match="not finished") as refusal:
        export_run(run_copy, "peft")
    assert f"tunesmith resume {run_copy}" in refusal.value.fix


def test_fault_27_a_failed_run(run_copy: Path) -> None:
    with RunFolder.open(run_copy) as folder:
        folder.append_event(CheckResult("failed", "stop", "the loss is not finite", 3))
    with pytest.raises(
        GateError, match="this run failed, and cannot be exported: the loss is not finite"
    ):
        export_run(run_copy, "merged")


def test_a_changed_adapter(run_copy: Path) -> None:
    file = run_copy / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors was changed"):
        export_run(run_copy, "merged")


def test_a_changed_base(tmp_path: Path) -> None:
    path = save_run(tmp_path / "work", save_model(tmp_path / "model"))
    for file, message in (
        ("model.safetensors", "base weights model.safetensors: sha256"),
        ("chat_template.jinja", "chat template default: sha256"),
    ):
        with (tmp_path / "model" / file).open("r+b") as stream:
            stream.seek(-1 if file.endswith(".safetensors") else 0, os.SEEK_END)
            stream.write(b" ")  # the last byte of a weight, or one more of the template
        with pytest.raises(InputError, match=message):
            export_run(path, "merged")


def test_data_that_are_gone(run_copy: Path, tmp_path: Path) -> None:
    plan = read_sealed_json(run_copy / "plan.json")
    plan["recipe"]["test_data"][0]["path"] = str(tmp_path / "gone.jsonl")
    (run_copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        export_run(run_copy, "merged")
    assert not (run_copy / "export" / "merged").exists()


def test_a_machine_without_memory(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.core.hardware.read_main_memory", lambda: (10**6, 10**4))
    with pytest.raises(MachineError, match="verifying the export needs about"):
        export_run(finished, "merged")


# ---------------------------------------------------------------- all weights trained


@pytest.mark.promise
def test_a_fully_trained_model(fully_trained: Path, tmp_path: Path) -> None:
    merged = export_run(fully_trained, "merged", out=tmp_path / "merged")
    assert merged.parity.mean_kl < 1e-9
    assert merged.parity.trained_kl > 1e-3
    for name in ("model.safetensors", "config.json"):
        trained = (fully_trained / "model" / name).read_bytes()
        assert (Path(merged.path) / name).read_bytes()[-1000:] == trained[-1000:]
    assert export_run(fully_trained, "gguf", out=tmp_path / "gguf").parity.same_answers == 4
    with pytest.raises(InputError, match="trained all weights: there is no adapter"):
        export_run(fully_trained, "peft")


def test_the_run_is_as_it_was(finished: Path, exports: dict[str, ExportResult]) -> None:
    assert exports
    assert not (finished / "export").exists()
    assert verify_dir(finished / "adapter") == ""
    assert os.listdir(finished)


@pytest.mark.promise
@pytest.mark.parametrize("family", ["llama", pytest.param("llama-wide", marks=pytest.mark.slow)])
def test_new_tokens_are_in_every_file(family: str, tmp_path: Path) -> None:
    """Seven of them, for five spare rows."""
    tokens = [f"[t{n}]" for n in range(7)]
    rows = [make_chat_row(f"{' '.join(tokens)} {n}", f"[t{n % 7}]{n}") for n in range(12)]
    data = {
        "data": str(write_rows(tmp_path / "t.jsonl", rows[:8])),
        "test_data": str(write_rows(tmp_path / "h.jsonl", rows[8:])),
    }
    path = save_run(
        tmp_path / "run", save_model(tmp_path / "model", family), add_tokens=tokens, **data
    )
    for target, kind in (("gguf", "f32"), ("ollama", "f32"), ("merged", None)):
        parity = export_run(path, target, kind=kind, out=tmp_path / f"{target}").parity
        assert (parity.same_prompts, parity.rendered_prompts) == (4, 4), target
        assert parity.mean_kl < (1e-2 if target == "merged" else 1e-6), target
