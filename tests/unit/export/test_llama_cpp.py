"""llama.cpp itself on the files that we write; compiled when it is first needed."""

import gc
import importlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_cpp_build import install_llama_cpp
from tiny_export import make_export_job, save_model, save_run
from tiny_runs import train
from tunesmith.export.export import export_run
from tunesmith.export.gguf import get_model_path, write_gguf
from tunesmith.export.parity import (
    MAX_NEW_TOKENS,
    ExportJob,
    LiveOutputs,
    Parity,
    ParityOutputs,
    ReloadedExport,
    compare_outputs,
    compute_live_outputs,
)
from tunesmith.recipe.demo import DEMO_RECIPE
from tunesmith.recipe.load import load_recipe

pytestmark = pytest.mark.slow
FLOAT32 = 0  # the number of a ggml type


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(install_llama_cpp(tmp_path_factory.mktemp("site"))))
        yield importlib.import_module("llama_cpp")


@contextmanager
def engine(llama_cpp: Any, file: Path, *, exact: bool = False) -> Iterator[Any]:
    """llama.cpp with a model; `exact` keeps keys and values in fp32."""
    cache = {"type_k": FLOAT32, "type_v": FLOAT32} if exact else {}
    model = llama_cpp.Llama(
        str(file),
        n_ctx=1024,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        **cache,
    )
    with closing(model):
        yield model
    gc.collect()


def answers(model: Any, job: ExportJob) -> ParityOutputs:
    """Logits where the live model's are taken, and greedy answers up to what llama.cpp takes for an
    end."""
    logits: list[torch.Tensor] = []
    greedy: list[tuple[int, ...]] = []
    for witness in job.examples:
        model.reset()
        model.eval(witness.document.tokens_L[: witness.positions[-1] + 1].tolist())
        logits.append(torch.from_numpy(model.scores[witness.positions].copy()))
        model.reset()
        model.eval(list(witness.prompt))
        answer: list[int] = []
        while len(answer) < MAX_NEW_TOKENS and not (answer and is_end(model, answer[-1])):
            answer.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(answer[-1:])
        greedy.append(tuple(answer))
    return ParityOutputs(tuple(logits), tuple(greedy))


def is_end(model: Any, token: int) -> bool:
    import llama_cpp

    return llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(model.model), token)


def rendered(model: Any, job: ExportJob) -> list[tuple[int, ...]]:
    """The prompts as its server makes them: the template inside the file, by its own Jinja, then
    its tokenizer."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    start = (
        model.detokenize([model.token_bos()], special=True).decode()
        if model.token_bos() >= 0
        else ""
    )
    formatter = Jinja2ChatFormatter(
        model.metadata["tokenizer.chat_template"], eos_token="", bos_token=start
    )
    texts = [formatter(messages=list(witness.messages)).prompt for witness in job.chat_examples]
    return [tuple(model.tokenize(text.encode(), add_bos=False, special=True)) for text in texts]


def parity(model: Any, job: ExportJob, live: LiveOutputs) -> Parity:
    reread = ReloadedExport(job.run.load_base_network(), rendered(model, job), (model.token_eos(),))
    return compare_outputs(job, live, answers(model, job), reread)


@pytest.mark.parametrize(
    "family", ["llama", "llama-wide", "llama-bias", "qwen2", "qwen3", "qwen3_moe", "lfm2"]
)
def test_every_family_is_the_same_network_there(
    llama_cpp: Any, family: str, tmp_path: Path
) -> None:
    job = make_export_job(
        save_run(tmp_path / "work", save_model(tmp_path / "model", family)),
        tmp_path / "export",
        "f32",
    )
    live = compute_live_outputs(job)
    write_gguf(job)
    with engine(llama_cpp, get_model_path(job), exact=True) as model:
        result = parity(model, job, live)
        assert model.token_eos() == job.run.renderer.end_ids[0]
    assert result.same_prompts == result.rendered_prompts == 4
    assert result.same_answers == 4
    assert result.mean_kl < 1e-6


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct after a few steps on the rows of the demo."""
    folder = tmp_path_factory.mktemp("real")
    rows = (DEMO_RECIPE.parent / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(rows[:8]))
    changed = {
        "test_data": str(folder / "test.jsonl"),
        "output_dir": str(folder / "run"),
        "max_steps": "8",
    }
    wish = load_recipe(DEMO_RECIPE, changed).model_copy(
        update={"eval_data": (), "retention_data": None}
    )
    train(wish)
    return folder / "run"


@pytest.fixture(scope="module")
def real_live(real_run: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveOutputs:
    return compute_live_outputs(make_export_job(real_run, tmp_path_factory.mktemp("live")))


# What the format costs and what llama.cpp's own arithmetic adds to it: it multiplies F16 and Q8_0
# with narrow inputs.
@pytest.mark.parametrize(
    ("kind", "mean_kl", "agreement"), [("f16", 1e-4, 0.99), ("q8_0", 1e-2, 0.97)]
)
def test_smollm2_answers_there_as_here(
    llama_cpp: Any,
    kind: str,
    mean_kl: float,
    agreement: float,
    real_run: Path,
    real_live: LiveOutputs,
    tmp_path: Path,
) -> None:
    made = export_run(real_run, "ollama", kind=kind, out=tmp_path / "ollama")
    assert made.parity.same_prompts == made.parity.prompts == 8
    job = make_export_job(real_run, tmp_path / "ollama", kind)
    with engine(llama_cpp, get_model_path(job)) as model:
        result = parity(model, job, real_live)
    assert result.same_prompts == result.rendered_prompts == 8
    assert result.mean_kl < mean_kl
    assert result.top1_agreement > agreement
    assert result.same_answers >= 6
