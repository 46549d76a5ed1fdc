"""`export --to vllm` and others: the files of a server, and what an engine cannot hold."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tiny_export import CHATML, save_run
from tunesmith.cli import app
from tunesmith.core.atomic import verify_dir
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.export.servers import (
    ENGINES,
    VLLM_RANKS,
    Deployment,
    ServedAdapter,
    _refuse_differences,
    _refuse_unsupported,
    bind_variables,
    build_server_files,
    export_servers,
)
from tunesmith.export.source_run import SourceRun, open_source_run
from tunesmith.model.experts import ExpertLoraTensors

GOLDEN = Path(__file__).parents[2] / "golden" / "servers"
DEPLOYMENT = Deployment(
    adapters=(
        ServedAdapter("invoices", "/runs/it's/invoices"),
        ServedAdapter("tickets-2", "/runs/tickets-2"),
    ),
    base="org/base-7b",
    hub_name="org/base-7b",
    revision="0123456789abcdef0123456789abcdef01234567",
    dtype="bfloat16",
    context_length=8192,
    max_rank=24,
    end_ids=(2, 7),
)
LOCAL = replace(
    DEPLOYMENT,
    adapters=DEPLOYMENT.adapters[1:],
    base="my $(base)",
    hub_name="",
    revision="",
    model_file="model-q8_0.gguf",
)


def iter_texts() -> Iterator[tuple[str, str]]:
    """Yield (name of the golden file, text)."""
    for target in ENGINES:
        deployment = LOCAL if target == "llama-server" else DEPLOYMENT
        for name, text in build_server_files(target, deployment).items():
            yield f"{target}-{name}", text


@pytest.mark.parametrize(("name", "text"), list(iter_texts()))
def test_files_are_as_they_were_read_over(name: str, text: str) -> None:
    assert text == (GOLDEN / name).read_text("utf-8")


@pytest.mark.parametrize("target", ["vllm", "sglang", "llama-server", "kserve", "ray"])
@pytest.mark.parametrize("deployment", [DEPLOYMENT, LOCAL], ids=["hub", "local"])
def test_scripts_are_valid(target: str, deployment: Deployment, tmp_path: Path) -> None:
    for name, text in build_server_files(target, deployment).items():
        (tmp_path / name).write_text(text)
    scripts = [str(path) for path in tmp_path.glob("*.sh")]
    for script in scripts:
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert scripts


def run_script(text: str, tmp_path: Path, program: str, **environment: str) -> list[str]:
    """Return the arguments that a start script gives its program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / program).chmod(0o755)
    (tmp_path / "serve.sh").write_text(text)
    done = subprocess.run(
        ["bash", str(tmp_path / "serve.sh")],
        env={"PATH": f"{folder}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_vllm_gets_each_adapter_as_one_argument(tmp_path: Path) -> None:
    text = build_server_files("vllm", DEPLOYMENT)["serve.sh"]
    words = run_script(text, tmp_path, "vllm", MAX_MODEL_LEN="4096")
    assert words[:2] == ["serve", "org/base-7b"]
    assert words[words.index("--max-model-len") + 1] == "4096"
    assert words[words.index("--max-lora-rank") + 1] == "32"
    start = words.index("--lora-modules") + 1
    modules = [json.loads(word) for word in words[start:]]
    assert [module["name"] for module in modules] == ["invoices", "tickets-2"]
    assert {module["base_model_name"] for module in modules} == {"base"}


def test_a_local_base_has_to_be_named(tmp_path: Path) -> None:
    text = build_server_files("vllm", LOCAL)["serve.sh"]
    (tmp_path / "serve.sh").write_text(text)
    done = subprocess.run(
        ["bash", str(tmp_path / "serve.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "set it to the folder of my base" in done.stderr


@pytest.mark.parametrize(("rank", "chosen"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320)])
def test_vllm_gets_the_smallest_rank_that_holds_all(rank: int, chosen: int) -> None:
    assert replace(DEPLOYMENT, max_rank=rank).vllm_rank == chosen
    assert chosen in VLLM_RANKS


# ---------------------------------------------------------------- real runs


@pytest.mark.promise
def test_a_run_becomes_a_folder_that_vllm_starts_from(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "second"
    shutil.copytree(finished, other)
    result = export_servers([finished, other], "vllm", out=tmp_path / "out")
    out = tmp_path / "out"
    assert [run.name for run in result.runs] == ["run", "second"]
    assert all(run.parity.same_answers == run.parity.prompts for run in result.runs)
    assert not verify_dir(out)
    for name in ("run", "second"):
        assert (out / "adapters" / name / "adapter_model.safetensors").is_file()
        assert not verify_dir(out / "adapters" / name)
    run = open_source_run(finished)
    generation = json.loads((out / "generation" / "generation_config.json").read_text())
    end_ids = generation["eos_token_id"]
    assert run.renderer.end_ids[0] in ([end_ids] if isinstance(end_ids, int) else end_ids)
    source = run.renderer.templates["default"].source
    assert (out / "chat_template.jinja").read_text() == source
    verify = (out / "verify.sh").read_text()
    assert f"tunesmith verify {finished} --url" in verify
    assert (out / "serve.sh").stat().st_mode & 0o111


def test_llama_server_gets_one_merged_gguf(finished: Path, tmp_path: Path) -> None:
    result = export_servers([finished], "llama-server", kind="q8_0", out=tmp_path / "out")
    assert "model/model-q8_0.gguf" in result.files
    assert "model/model-q8_0.gguf" in (tmp_path / "out" / "serve.sh").read_text()


def test_the_verb_takes_several_runs_for_servers_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_verb(*words: str) -> Json:
        with pytest.raises(SystemExit) as ended:
            app.main(["export", *words, "--json"])
        output = json.loads(capsys.readouterr().out)
        assert (ended.value.code or 0) == output.get("error", {}).get("exit_code", 0)
        return output

    run = str(finished)
    assert "takes one run" in run_verb(run, run, "--to", "peft")["error"]["message"]
    assert (
        "two runs are called" in run_verb(run, run, "--to", "ray", "--out", "x")["error"]["message"]
    )
    assert "no default output" in run_verb(run, run, "--to", "vllm")["error"]["message"]
    assert "vllm" in run_verb(run, "--to", "vlm")["error"]["fix"]
    base = run_verb(run, "--to", "merged", "--base", "original")["error"]
    assert base["message"] == "--base is no longer a flag"
    assert "the weights that it was trained on" in base["fix"]
    assert "hf upload" in run_verb(run, "--to", "hub")["error"]["fix"]
    output = run_verb(run, "--to", "sglang", "--out", str(tmp_path / "out"))
    assert output["runs"][0]["name"] == "run"


# ---------------------------------------------------------------- what an engine cannot hold


@pytest.fixture(scope="module")
def source(finished: Path) -> SourceRun:
    return open_source_run(finished)


def change_loras(source: SourceRun, **changes: Any) -> SourceRun:
    loras = {path: replace(lora, **changes) for path, lora in source.loras.items()}
    return replace(source, loras=loras)


def test_what_no_engine_serves_is_refused_by_name(source: SourceRun) -> None:
    lora = next(iter(source.loras.values()))
    experts = ExpertLoraTensors(lora.a_RI[None], lora.b_OR[None], 1.0)  # type: ignore[union-attr]
    wide = lora.a_RI.new_zeros(513, lora.a_RI.shape[1])  # type: ignore[union-attr]
    refused = {
        "DoRA": change_loras(source, magnitude_O=lora.b_OR[:, 0]),  # type: ignore[union-attr]
        "experts": replace(source, loras={"experts": experts}),
        "4-bit": replace(source, quantized_paths=frozenset({"x"})),
        "added tokens": replace(source, token_rows={"embed": None}),  # type: ignore[dict-item]
        "modules_to_save": replace(source, modules={"lm_head": None}),  # type: ignore[dict-item]
        "trained all weights": replace(source, loras={}),
        "rank 513": change_loras(source, a_RI=wide),
    }
    for words, run in refused.items():
        for target in ("vllm", "sglang", "kserve", "ray"):
            with pytest.raises(InputError, match=words) as error:
                _refuse_unsupported(run, target)
            assert "--to merged" in error.value.fix
    for target in ("vllm", "sglang", "kserve", "ray"):
        _refuse_unsupported(source, target)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_layers_with_a_scale_of_their_own_are_refused(
    key: str, source: SourceRun, tmp_path: Path
) -> None:
    """Servers give all layers one scale, and do not look at these keys."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({key: {"q_proj": 4}}))
    with pytest.raises(InputError, match=f"no {key}"):
        _refuse_unsupported(replace(source, saved_dir=tmp_path), "vllm")


def test_variables_are_refused_where_the_template_is_not_ours(source: SourceRun) -> None:
    recipe = source.recipe.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    run = replace(source, recipe=recipe)
    for target in ("kserve", "ray"):
        with pytest.raises(InputError, match="chat_template_kwargs"):
            _refuse_unsupported(run, target)
    _refuse_unsupported(run, "vllm")


def test_runs_with_other_templates_need_servers_of_their_own(
    source: SourceRun, tiny_llama: Path, tmp_path: Path
) -> None:
    template = tmp_path / "other.jinja"
    template.write_text(CHATML.replace("system\n", "system: "))
    other = open_source_run(save_run(tmp_path / "work", tiny_llama, chat_template=template))
    with pytest.raises(
        InputError, match="its chat template, chat_template_kwargs or tokenizer differs from"
    ):
        _refuse_differences([source, other])
    _refuse_differences([source, source])


def test_several_runs_for_llama_server_are_refused(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "second"
    shutil.copytree(finished, other)
    with pytest.raises(InputError, match="one run per server"):
        export_servers([finished, other], "llama-server", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["", "\n", "  "])
def test_variables_in_a_template_are_those_that_a_request_passes(
    start: str, tiny_llama: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    template = (
        start + "{% macro show() %}{{ mode }}{% endmacro %}{% for m in messages %}{{ m.content }}"
        "{% if thinking %}<think>{% endif %}{{ show() }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "hello"}]
    variables = {"thinking": True, "mode": 'a "quoted" ünïcode {% text'}

    def render(text: str, **passed: Any) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **passed)

    bound = bind_variables(template, variables, where="run")
    assert render(bound) == render(template, **variables)
    assert render(bound, thinking=False) == render(template, **variables)
    with pytest.raises(InputError, match="tags is not a number"):
        bind_variables(template, {"tags": ["a"]}, where="run")
