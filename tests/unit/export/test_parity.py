"""The gate: each way in which an export could be wrong, done to the files, is seen when they are
read back."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tiny_export import CHATML, judge_export, make_export_job, save_model, save_run
from tiny_runs import make_chat_row, make_tiny_recipe, write_rows
from tunesmith.cli.views.results import render_export
from tunesmith.core.errors import GateError, TunesmithError
from tunesmith.export.export import TARGETS, export_run
from tunesmith.export.gguf import get_model_path
from tunesmith.export.parity import (
    ExportJob,
    LiveOutputs,
    ParityOutputs,
    ReloadedExport,
    compare_outputs,
    compute_export_outputs,
    compute_live_outputs,
    compute_mean_kl,
    refuse_mismatch,
)
from tunesmith.model.gguf.reader import read_gguf
from tunesmith.session import inputs, planner
from tunesmith.train import run


@pytest.fixture(scope="module")
def live(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveOutputs:
    return compute_live_outputs(make_export_job(finished, tmp_path_factory.mktemp("live")))


def weights(job: ExportJob, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = job.folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def settings(file: str, **changed: object) -> Callable[[ExportJob], None]:
    def change(job: ExportJob) -> None:
        content = json.loads((job.folder / file).read_text())
        (job.folder / file).write_text(json.dumps(content | changed))

    return change


def template(old: str, new: str) -> Callable[[ExportJob], None]:
    def change(job: ExportJob) -> None:
        file = job.folder / ("Modelfile" if job.export_type else "chat_template.jinja")
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def in_gguf(old: bytes, new: bytes) -> Callable[[ExportJob], None]:
    """The same number of bytes, in the header."""

    def change(job: ExportJob) -> None:
        file = get_model_path(job)
        content = file.read_bytes()
        assert len(old) == len(new)
        assert content.count(old) == 1
        file.write_bytes(content.replace(old, new))

    return change


def swapped_rows(job: ExportJob) -> None:
    """q of the first layer in the order of transformers, which is not that of llama.cpp."""
    file = get_model_path(job)
    (tensor,) = (
        tensor for tensor in read_gguf(file).tensors if tensor.name == "blk.0.attn_q.weight"
    )
    rows, head = tensor.shape[0], job.run.model_spec.head_dim
    with file.open("r+b") as stream:
        stream.seek(tensor.begin)
        values = np.frombuffer(stream.read(tensor.nbytes), np.uint8).reshape(
            rows // head, head // 2, 2, -1
        )
        stream.seek(tensor.begin)
        stream.write(values.swapaxes(1, 2).tobytes())


def key(name: str) -> bytes:
    return len(name).to_bytes(8, "little") + name.encode()


def number(name: str, value: int | float) -> bytes:
    kind, raw = (
        (6, np.float32(value).tobytes())
        if isinstance(value, float)
        else (4, np.uint32(value).tobytes())
    )
    return key(name) + np.uint32(kind).tobytes() + raw


def ends(job: ExportJob) -> None:
    end, start = job.run.renderer.end_ids[0], job.run.renderer.tokenizer.token_to_id("<|im_start|>")
    assert start is not None
    name = "tokenizer.ggml.eos_token_id"
    in_gguf(number(name, end), number(name, start))(job)


UP = "model.layers.1.mlp.up_proj.weight"
BAD_TOKENS, BAD_WEIGHTS, BAD_ENDS = "prompts are rendered to other tokens", "KL", "answers end in"
CORRUPTIONS: dict[str, tuple[str, str, Callable[[ExportJob], None], str]] = {
    "peft: another scale": ("peft", "", settings("adapter_config.json", lora_alpha=3), BAD_WEIGHTS),
    "peft: rsLoRA": ("peft", "", settings("adapter_config.json", use_rslora=True), BAD_WEIGHTS),
    "peft: another template": ("peft", "", template("You are small.", "You are big."), BAD_TOKENS),
    "peft: another end": (
        "peft",
        "",
        settings("generation_config.json", eos_token_id=[3]),
        BAD_ENDS,
    ),
    "merged: a matrix without its delta": (
        "merged",
        "",
        lambda job: weights(job, UP, lambda _: base_of(job, UP)),
        BAD_WEIGHTS,
    ),
    "merged: a value too large": (
        "merged",
        "",
        lambda job: weights(job, UP, lambda w: torch.where(w == w.max(), w + 30, w)),
        BAD_WEIGHTS,
    ),
    "merged: NaN": (
        "merged",
        "",
        lambda job: weights(job, UP, lambda w: w * torch.nan),
        "NaN or infinite",
    ),
    "merged: another rope": (
        "merged",
        "",
        settings("config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e3}),
        BAD_WEIGHTS,
    ),
    "merged: no end": (
        "merged",
        "",
        settings("generation_config.json", eos_token_id=None),
        BAD_ENDS,
    ),
    "merged: another end": (
        "merged",
        "",
        settings("generation_config.json", eos_token_id=[258]),
        BAD_ENDS,
    ),
    "merged: a line end less": (
        "merged",
        "",
        template("<|im_end|>\n' }}", "<|im_end|>' }}"),
        BAD_TOKENS,
    ),
    "gguf: q not in its order": ("gguf", "f16", swapped_rows, BAD_WEIGHTS),
    "gguf: another rope": (
        "gguf",
        "f16",
        in_gguf(number("llama.rope.freq_base", 1e4), number("llama.rope.freq_base", 2e4)),
        BAD_WEIGHTS,
    ),
    "gguf: another end": ("gguf", "f16", ends, BAD_ENDS),
    "gguf: another cut": (
        "gguf",
        "f16",
        in_gguf(key("smollm"), key("gpt-2\0")),
        "unknown pre-tokenizer",
    ),
    "gguf: another template": (
        "gguf",
        "q8_0",
        in_gguf(b"You are small.", b"You are large."),
        BAD_TOKENS,
    ),
    "ollama: another system message": (
        "ollama",
        "f16",
        template("You are small.", "You are smart."),
        BAD_TOKENS,
    ),
    "ollama: a space more": (
        "ollama",
        "f16",
        template("{{ .Role }}\n", "{{ .Role }}\n "),
        BAD_TOKENS,
    ),
}


def base_of(job: ExportJob, name: str) -> torch.Tensor:
    return load_file(job.run.model_spec.path / "model.safetensors")[name]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_export_fails(
    name: str, finished: Path, live: LiveOutputs, tmp_path: Path
) -> None:
    target, kind, corrupt, message = CORRUPTIONS[name]
    job = make_export_job(finished, tmp_path, kind)
    TARGETS[target][kind].write(job)
    corrupt(job)
    with pytest.raises(TunesmithError, match=message):
        judge_export(job, target, live)


def test_what_is_said_when_all_is_wrong(finished: Path, live: LiveOutputs, tmp_path: Path) -> None:
    job = make_export_job(finished, tmp_path, "f16")
    form = TARGETS["gguf"]["f16"]
    form.write(job)
    reread = replace(form.reload(job), rendered_ids=[()] * 4, end_ids=(1,))
    parity = replace(compare_outputs(job, live, live, reread), mean_kl=2.0, max_kl=3.0)
    with pytest.raises(GateError) as refusal:
        refuse_mismatch(form.tolerance, parity, job, reread)
    end = job.run.renderer.end_ids[0]
    assert refusal.value.message == (
        "the export does not behave as the run: 4 of 4 prompts are rendered to other tokens; "
        f"answers end in [1], they were trained to end in {end}; "
        "the mean KL to the run is 2, above 0.0001; "
        f"it loses what training changed: a mean KL of 2 of {parity.trained_kl:.2g}; "
        "the largest KL at a position is 3, above 0.01"
    )
    assert "please report this" in refusal.value.fix
    with pytest.raises(GateError) as refusal:
        refuse_mismatch(form.tolerance, replace(parity, same_prompts=4), job, form.reload(job))
    assert "rounding weights to 16 bits loses small changes" in refusal.value.fix


def lose_adapter(job: ExportJob) -> None:
    base = load_file(job.run.model_spec.path / "model.safetensors")
    save_file(base, job.folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("step", [1.0, 0.05])
def test_a_merge_without_its_adapter_fails_however_little_was_trained(
    step: float, finished: Path, live: LiveOutputs, tmp_path: Path
) -> None:
    job = make_export_job(finished, tmp_path)
    form = TARGETS["merged"][""]
    form.write(job)
    lose_adapter(job)
    reread = form.reload(job)
    base = compute_export_outputs(job, reread)
    pairs = zip(base.logits, live.logits, strict=True)
    logits = tuple(b + step * (ours - b) for b, ours in pairs)
    short = LiveOutputs(logits, live.greedy, compute_mean_kl(logits, base.logits))
    parity = compare_outputs(job, short, base, reread)
    with pytest.raises(GateError, match="it loses what training changed"):
        refuse_mismatch(form.tolerance, parity, job, reread)
    refuse_mismatch(form.tolerance, compare_outputs(job, short, short, reread), job, reread)


@pytest.mark.parametrize(("share", "fails"), [(0.2, False), (0.3, True), (1.0, True)])
def test_the_tolerance_is_relative_to_what_training_changed(
    share: float, fails: bool, finished: Path, live: LiveOutputs, tmp_path: Path
) -> None:
    job = make_export_job(finished, tmp_path)
    form = TARGETS["merged"][""]
    form.write(job)
    reread = form.reload(job)
    parity = compare_outputs(job, live, live, reread)
    parity = replace(parity, mean_kl=share * 1e-4, trained_kl=1e-4)
    if fails:
        with pytest.raises(GateError, match="it loses what training changed"):
            refuse_mismatch(form.tolerance, parity, job, reread)
    else:
        refuse_mismatch(form.tolerance, parity, job, reread)
    untrained = replace(parity, mean_kl=5e-7, trained_kl=0.0)
    refuse_mismatch(form.tolerance, untrained, job, reread)


def test_an_export_that_loses_much_of_what_training_changed_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = export_run(finished, "peft", out=tmp_path / "out")
    for share, is_warned in ((0.05, False), (0.5, True)):
        lossy = replace(made.parity, mean_kl=share * 1e-3, trained_kl=1e-3)
        Console(width=200).print(render_export(replace(made, parity=lossy)))
        assert ("loses much of what training changed" in capsys.readouterr().out) is is_warned


def test_parity_of_a_run_with_itself(finished: Path, live: LiveOutputs, tmp_path: Path) -> None:
    job = make_export_job(finished, tmp_path)
    reread = ReloadedExport(
        job.run.load_base_network(),
        [w.rendered_ids for w in job.chat_examples],
        job.run.renderer.end_ids,
    )
    parity = compare_outputs(job, live, live, reread)
    assert (parity.mean_kl, parity.max_kl, parity.max_logit_difference, parity.top1_agreement) == (
        0,
        0,
        0,
        1,
    )
    assert parity.prompts == parity.same_prompts == parity.same_answers == 4
    assert parity.positions == sum(len(witness.positions) for witness in job.examples)
    base = compare_outputs(job, live, compute_export_outputs(job, reread), reread)
    assert parity.trained_kl == pytest.approx(
        base.mean_kl, rel=1e-4
    )  # the base alone is as far as training went
    assert base.same_answers < 4


def test_kl_against_torch(finished: Path, live: LiveOutputs, tmp_path: Path) -> None:
    job = make_export_job(finished, tmp_path)
    other = ParityOutputs(
        tuple(logits + torch.randn_like(logits) for logits in live.logits), live.greedy
    )
    reread = ReloadedExport(
        job.run.load_base_network(), [w.rendered_ids for w in job.chat_examples], (0,)
    )
    parity = compare_outputs(job, live, other, reread)
    p, q = (torch.cat(answers.logits).double().log_softmax(-1) for answers in (live, other))
    assert parity.mean_kl == pytest.approx(
        float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
    )


def test_rows_without_messages_are_compared_too(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} and {n} = ", "completion": f"{2 * n}"} for n in range(1, 9)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = save_run(
        tmp_path / "work", tiny_llama, data=str(file), test_data=None, chat_template="none"
    )
    job = make_export_job(path, tmp_path / "export", "f16")
    assert job.chat_examples == []
    TARGETS["gguf"]["f16"].write(job)
    judge_export(job, "gguf", compute_live_outputs(job))
    assert "tokenizer.chat_template" not in gguf.GGUFReader(get_model_path(job)).fields


@pytest.mark.parametrize(
    ("template", "question"),
    [
        (CHATML, "5 and <|im_end|>"),  # stock tokenizers make a control token of it, ours does not
        (
            "{{ strftime_now('%Y-%m-%d') }}\n" + CHATML,
            "5 and 15",
        ),  # ours was frozen when the run was planned
    ],
)
def test_what_others_rightly_render_otherwise(template: str, question: str, tmp_path: Path) -> None:
    rows = [make_chat_row(question + " please" * n, '{"sum": 20}') for n in range(4)]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    model = save_model(tmp_path / "model", template=template)
    wish = make_tiny_recipe(model, tmp_path, data=data, learning_rate=0.03)
    run_inputs = inputs.load_inputs(wish, now=datetime(2020, 2, 2))
    list(run.train(planner.make_plan(run_inputs), run_inputs))
    job = make_export_job(tmp_path / "run", tmp_path / "export")
    assert all(
        witness.rendered_ids and witness.rendered_ids != witness.prompt
        for witness in job.chat_examples
    )
    TARGETS["merged"][""].write(job)
    judge_export(job, "merged", compute_live_outputs(job))
