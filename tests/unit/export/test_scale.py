"""`tunesmith export --scale`: others load the adapter times the scale, as `tunesmith eval RUN@0.5`
measures it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_export import save_model, save_run
from tiny_runs import make_chat_row, write_eval_files, write_rows
from tunesmith.cli import app
from tunesmith.core.atomic import read_manifest, verify_dir
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Pack
from tunesmith.data.collate import collate
from tunesmith.export.export import TARGETS, export_run
from tunesmith.export.hf import _copy_files
from tunesmith.export.parity import ParityExample, compute_example_logits, select_examples
from tunesmith.export.source_run import open_source_run
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.gguf.reader import read_gguf
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.session.reopen import load_trained_session
from tunesmith.train.model_card import CARD_FILE

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's


def our_logits(run: Path, witnesses: Sequence[ParityExample], scale: float) -> tuple[Tensor, ...]:
    """What the model that is evaluated says, at the places of the witnesses."""
    model = load_trained_session(run).model
    model.network.eval()
    with torch.no_grad(), scaled_adapter(model.network, scale):
        batches = [collate(Pack((witness.document,)), model.device) for witness in witnesses]
        return tuple(model.head.compute_logits(model.compute_hidden(batch)) for batch in batches)


def logits_of_peft(
    run: Path, adapter: Path, witnesses: Sequence[ParityExample]
) -> tuple[Tensor, ...]:
    base = json.loads((run / "plan.json").read_text())["model"]["path"]
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return compute_example_logits(PeftModel.from_pretrained(network, adapter).eval(), witnesses)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rslora_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("rslora-run"), tiny_llama, use_rslora=True)


@pytest.mark.promise
@pytest.mark.parametrize("name", ["finished", "dora_run", "rslora_run"])
def test_peft_says_what_our_evaluation_says(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(name)
    made = export_run(run, "peft", scale=0.3, out=tmp_path / "out")
    witnesses = select_examples(open_source_run(run))
    ours, full = (our_logits(run, witnesses, scale) for scale in (0.3, 1))
    torch.testing.assert_close(
        logits_of_peft(run, Path(made.path), witnesses), ours, rtol=1e-4, atol=1e-4
    )
    assert (
        min(float((item - other).abs().max()) for item, other in zip(ours, full, strict=True))
        > 0.05
    )
    weights = "adapter_model.safetensors"
    assert (Path(made.path) / weights).read_bytes() == (run / "adapter" / weights).read_bytes()


@pytest.mark.parametrize(("target", "kind"), [("merged", None), ("gguf", "f32"), ("ollama", "f16")])
def test_every_target_is_the_run_at_that_scale(
    target: str, kind: str | None, finished: Path, tmp_path: Path
) -> None:
    full = export_run(finished, target, kind=kind, out=tmp_path / "whole")
    half = export_run(finished, target, kind=kind, scale=0.5, out=tmp_path / "half")
    assert half.parity.mean_kl < (1e-2 if target == "merged" else 1e-4)
    assert half.parity.trained_kl < 0.7 * full.parity.trained_kl, "half of it moves the model less"
    assert (full.scale, half.scale) == (1, 0.5)
    sealed = read_manifest(tmp_path / "half")
    assert (sealed["scale"], sealed["origin"].endswith("in run run@0.5")) == (0.5, True)
    assert read_manifest(tmp_path / "whole")["scale"] == 1
    for file in (tmp_path / "half").glob("*.gguf"):
        assert read_gguf(file).metadata["general.name"].endswith("run@0.5")


@pytest.mark.promise
def test_rows_of_new_tokens_go_part_of_the_way(tmp_path: Path) -> None:
    tokens = [f"[t{n}]" for n in range(3)]
    rows = [make_chat_row(f"{' '.join(tokens)} {n}", f"[t{n % 3}]{n}") for n in range(12)]
    data = {
        "data": str(write_rows(tmp_path / "t.jsonl", rows[:8])),
        "test_data": str(write_rows(tmp_path / "h.jsonl", rows[8:])),
    }
    run = save_run(tmp_path / "run", save_model(tmp_path / "model"), add_tokens=tokens, **data)
    made = export_run(run, "peft", scale=0.5)
    assert made.parity.mean_kl < 1e-6
    assert export_run(run, "merged", scale=0.5).parity.mean_kl < 1e-2
    began, half, end = (
        next(
            t
            for name, t in load_file(folder / "adapter_model.safetensors").items()
            if "trainable_tokens" in name
        )
        for folder in (
            Path(export_run(run, "peft", scale=1e-9).path),
            Path(made.path),
            run / "adapter",
        )
    )
    torch.testing.assert_close(half, (began + end) / 2)
    assert not torch.allclose(began, end)


@pytest.mark.promise
def test_card_and_config_and_manifest_say_the_scale(tiny_llama: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path, tiny_llama, **write_eval_files(tmp_path / "files"))
    made = Path(export_run(run, "peft", scale=0.5).path)
    assert made == run / "export" / "peft@0.5"
    assert verify_dir(made) == ""
    card = (made / CARD_FILE).read_text()
    run_card = (run / "adapter" / CARD_FILE).read_text()
    assert "The trained adapter multiplied by 0.5" in card
    assert "0.5 keeps " in card
    assert "of the gain" in card
    head, _, rest = card.partition("\n## Scale\n")
    assert run_card.startswith(head)
    assert run_card.endswith(rest.partition("\n## Results")[2])
    alphas = [
        json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
        for folder in (run / "adapter", made)
    ]
    assert alphas[1] == alphas[0] / 2
    base = Path(json.loads((run / "plan.json").read_text())["model"]["path"])
    path = "model.layers.1.mlp.up_proj"
    scaling = read_adapter(made, base).compute_scaling(path)
    assert scaling == read_adapter(run, base).compute_scaling(path) / 2
    other = Path(export_run(run, "peft", scale=0.3).path) / CARD_FILE
    assert "Not measured at this scale." in other.read_text()


def test_the_gate_sees_another_scale(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        TARGETS["peft"], "", dataclasses.replace(TARGETS["peft"][""], write=_copy_files)
    )
    with pytest.raises(GateError, match="the export does not behave as the run"):
        export_run(finished, "peft", scale=0.5, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scale", "output"),
    [
        ("0", "the adapter at scale 0 is the base model"),
        ("-0.5", "scale -0.5 is out of range"),
        ("nan", "scale nan is out of range"),
        ("inf", "scale inf is out of range"),
        ("2.5", "scale 2.5 is out of range"),
        ("half", "Invalid value for '--scale'"),
    ],
)
def test_what_is_no_scale(
    scale: str, output: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(["export", str(finished), "--to", "peft", "--scale", scale])
    assert ended.value.code == 2
    assert output in capsys.readouterr().err
    assert not (finished / "export").exists()


def test_a_model_whose_weights_were_all_trained_has_no_adapter_to_scale(
    fully_trained: Path,
) -> None:
    with pytest.raises(InputError, match="there is no adapter to scale") as refusal:
        export_run(fully_trained, "merged", scale=0.5)
    assert refusal.value.fix == "leave --scale out"
