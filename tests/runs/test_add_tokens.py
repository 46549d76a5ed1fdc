"""A run that adds tokens: what the plan says, the same bytes after a resume, going on, and every
export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tiny_runs import (
    make_chat_row,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    save_model_folder,
    select_steps,
    train,
    write_rows,
)
from tunesmith import api
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.types import Json, Pack
from tunesmith.data.collate import collate
from tunesmith.export.export import export_run
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.session.reopen import load_trained_session
from tunesmith.train import run, stages

pytestmark = [
    pytest.mark.promise,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
TOKENS = ["[sum]", "<n>"]
IDS = {"[sum]": 259, "<n>": 260}


def marked(first: int, count: int) -> list[Json]:
    return [
        make_chat_row(f"<n>{n}<n>{n + 1}", f"[sum]{2 * n + 1}<n>")
        for n in range(first, first + count)
    ]


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    data = str(write_rows(folder / "marked.jsonl", marked(1, 6)))
    test = str(write_rows(folder / "test.jsonl", marked(30, 4)))
    return make_tiny_recipe(
        model, folder, **({"data": data, "test_data": test, "add_tokens": TOKENS} | changed)
    )


def location(wish: Recipe) -> Path:
    return Path(str(wish.output_dir))


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is tied, and its embedding has five rows without a token."""
    folder = save_model_folder(tmp_path_factory.mktemp("tied"))
    config = json.loads((folder / "config.json").read_text()) | {
        "tie_word_embeddings": True,
        "vocab_size": 264,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["untied, grown", "tied, spare"])
def model(request: pytest.FixtureRequest, tiny_folder: Path, tied_folder: Path) -> Path:
    return tied_folder if request.param == "tied, spare" else tiny_folder


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run; its recipe."""
    custom = wish(model, tmp_path_factory.mktemp("first"))
    train(custom)
    return custom


# ---------------------------------------------------------------- the plan


def test_the_plan_says_what_is_trained_and_why(
    tiny_folder: Path, tied_folder: Path, tmp_path: Path
) -> None:
    plan = plan_recipe(wish(tiny_folder, tmp_path / "a"))
    assert plan.config.add_tokens == IDS
    assert "3 for <n>); the embedding grows by 2 rows" in plan.reasons["add_tokens"].reason
    assert plan.config.new_rows_modules == ("embed_tokens", "lm_head")
    assert plan.config.new_rows_lr_factor == pytest.approx(
        min(10, max(1, 0.01 / plan.config.learning_rate)), rel=1e-3
    )
    assert "128 values; all other rows stay" in plan.reasons["new_rows_modules"].reason
    tied = plan_recipe(wish(tied_folder, tmp_path / "b"))
    assert tied.config.new_rows_modules == ("embed_tokens",)
    assert "has spare rows for them" in tied.reasons["add_tokens"].reason
    full = plan_recipe(wish(tiny_folder, tmp_path / "c", method="full", lora_r="auto"))
    assert full.config.add_tokens == IDS
    assert full.config.new_rows_modules is None
    without = plan_recipe(wish(tiny_folder, tmp_path / "d", add_tokens=[]))
    assert plan.memory_bytes["trained"] - without.memory_bytes["trained"] == 128 * 16
    assert not {"add_tokens", "new_rows_modules"} & without.reasons.keys()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("['<n>', '<n>']", "add_tokens: '<n>' is repeated"),
        ("['']", "a token has 1 to 200 characters, '' has 0"),
        ("<n>,", "'' has 0"),
        ("['New York']", "'New York' contains white space"),
        ("[7]", "expected a text, found the number 7"),
    ],
)
def test_texts_that_are_no_tokens_are_refused_with_the_reason(written: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(None, {"model": "m", "data": "d.jsonl", "add_tokens": written})
    values = {"model": "m", "data": "d.jsonl", "add_tokens": "<n>"}
    for modules in ("embed_tokens", "[norm, lm_head]"):
        with pytest.raises(InputError, match="contradict add_tokens, which trains and saves"):
            load_recipe(None, values | {"modules_to_save": modules})
    assert load_recipe(None, values | {"modules_to_save": "norm"})


def test_a_token_that_stands_in_no_row_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no training row contains '\[never\]'"):
        plan_recipe(wish(tiny_folder, tmp_path, add_tokens=[*TOKENS, "[never]"]))


def test_a_tokenizer_that_is_larger_than_its_model_is_refused(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[one]", "[two]"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        InputError, match="the tokenizer has 261 tokens, but the embedding has 259 rows"
    ):
        plan_recipe(wish(folder, tmp_path / "r"))


# ---------------------------------------------------------------- the run


def test_what_a_run_leaves(first: Recipe, model: Path) -> None:
    adapter = location(first) / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in TOKENS} == IDS
    config = json.loads((adapter / "adapter_config.json").read_text())
    tied = json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    assert config["trainable_token_indices"] == {
        name: [259, 260] for name in ("embed_tokens", "lm_head")[: 2 - tied]
    }


def test_peft_answers_as_the_run_does(first: Recipe, model: Path) -> None:
    """By the files alone: the base as its users load it, longer where the adapter's tokenizer
    is."""
    adapter = location(first) / "adapter"
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    if base.config.vocab_size < len(AutoTokenizer.from_pretrained(adapter)):
        base.resize_token_embeddings(261)
    theirs: Any = PeftModel.from_pretrained(base, adapter).eval()
    bench = load_trained_session(location(first))
    document = bench.rows.render_documents(0)[0]
    tokens = document.tokens_L.tolist()
    batch = collate(Pack((document,)))
    with torch.no_grad():
        ours = bench.model.head.compute_logits(bench.model.compute_hidden(batch))
        expected = theirs(input_ids=torch.tensor([tokens])).logits[0, batch.positions_S]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_has_the_same_bytes(first: Recipe, model: Path, tmp_path: Path) -> None:
    custom = wish(model, tmp_path, save_steps=1)
    run_inputs = inputs.load_inputs(custom)
    run_until_saved(run.train(planner.make_plan(run_inputs), run_inputs), 1)
    list(run.resume(location(custom)))
    assert read_adapter_bytes(custom) == read_adapter_bytes(first)


def test_before_is_the_base_with_the_tokens_as_they_started(first: Recipe) -> None:
    events = [
        json.loads(line) for line in (location(first) / "events.jsonl").read_text().splitlines()
    ]
    before = {e["metric"]: e["value"] for e in events if e["type"] == "score" and e["step"] == 0}
    again = {item.metric: item for item in tunesmith.evaluate(location(first)).comparisons}
    assert again["loss"].before.value == pytest.approx(before["loss"], rel=1e-6)
    assert again["loss"].after.value < again["loss"].before.value - 0.1


def test_going_on_needs_the_same_tokens(first: Recipe, model: Path, tmp_path: Path) -> None:
    start = {"adapter_from": str(location(first)), "lora_r": "auto"}
    custom = wish(model, tmp_path / "on", **start, learning_rate=1e-12)
    events = train(custom)
    assert "at most 0.0" in next(
        e.evidence
        for e in events
        if isinstance(e, CheckResult) and e.kind == "logits match transformers"
    )
    trained, more = (
        load_file(location(item) / "adapter" / "adapter_model.safetensors")
        for item in (first, custom)
    )
    assert trained.keys() == more.keys()
    assert all(torch.allclose(trained[name], more[name], atol=1e-10) for name in trained)
    with pytest.raises(
        InputError, match=r"has embeddings for 2 new tokens.*\n?.*add_tokens: \['\[sum\]', '<n>'\]"
    ):
        plan_recipe(wish(model, tmp_path / "a", **start, add_tokens=[]))
    with pytest.raises(InputError, match="has embeddings for 2 new tokens"):
        plan_recipe(wish(model, tmp_path / "b", **start, add_tokens=TOKENS[::-1]))


def test_an_adapter_without_the_tokens_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    plain = make_tiny_recipe(tiny_folder, tmp_path / "plain")
    train(plain)
    with pytest.raises(
        InputError, match="was trained without new tokens: it has no embeddings for them"
    ):
        plan_recipe(
            wish(tiny_folder, tmp_path / "more", adapter_from=str(location(plain)), lora_r="auto")
        )


@pytest.mark.parametrize(
    "changed", [{"method": "full", "lora_r": "auto"}, {"method": "qlora", "use_dora": True}]
)
def test_other_methods_learn_them_too(tiny_folder: Path, tmp_path: Path, changed: Any) -> None:
    custom = wish(tiny_folder, tmp_path, num_train_epochs=3, **changed)
    steps = select_steps(train(custom))
    assert steps[-1].loss < steps[0].loss - 0.3
    assert export_run(location(custom), "merged").parity.mean_kl < 1e-6


def test_pairs_are_compared_with_the_base(tiny_folder: Path, tmp_path: Path) -> None:
    """DPO's reference has the rows as they started: the first loss is that of no change."""
    rows = [{"prompt": f"<n>{n}", "chosen": f"[sum]{n}", "rejected": f"no {n}"} for n in range(6)]
    data = str(write_rows(tmp_path / "pairs.jsonl", rows))
    custom = wish(
        tiny_folder,
        tmp_path,
        stage="preference",
        loss={"nll_coefficient": 0},
        data=data,
        test_data=[],
    )
    steps = select_steps(train(custom))
    assert steps[0].loss == pytest.approx(0.6931, abs=1e-4)
    assert steps[-1].loss < steps[0].loss


def test_texts_have_them_too(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "t.jsonl", [{"text": f"see <n>{n} [sum] and more"} for n in range(8)]
    )
    texts = {
        "stage": "cpt",
        "batch_size": "auto",
        "batch_tokens": 64,
        "max_length": 32,
        "test_data": [],
    }
    custom = wish(tiny_folder, tmp_path, data=str(rows), **texts)
    steps = select_steps(train(custom))
    assert steps[-1].loss < steps[0].loss


def test_stages_hand_the_rows_on(tiny_folder: Path, tmp_path: Path) -> None:
    """What texts have taught stays where no answer holds it; a stage with other tokens is refused
    before the first."""
    texts = write_rows(
        tmp_path / "texts.jsonl", [{"text": f"see <n>{n} [sum] and more"} for n in range(8)]
    )
    rows = write_rows(
        tmp_path / "rows.jsonl", [make_chat_row(f"<n>{n}", f"{n}<n>") for n in range(6)]
    )
    cpt = {"data": str(texts), "max_length": 32, "batch_tokens": 64}
    sft: Json = {"data": str(rows), "batch_size": 2}
    both = {
        "model": str(tiny_folder),
        "add_tokens": TOKENS,
        "lora_r": 2,
        "dtype": "fp32",
        "learning_rate": 0.01,
    }
    both |= {"output_dir": str(tmp_path / "run"), "num_train_epochs": 1}
    made = api.read_recipe({**both, "stage": [{"cpt": cpt}, {"sft": sft}]})
    run_inputs = stages.load_stage_inputs(made)
    steps = select_steps(list(api.train(stages.make_staged_plan(run_inputs), run_inputs)))
    assert steps[-1].loss < steps[-3].loss
    other = api.read_recipe(
        {**both, "stage": [{"cpt": cpt}, {"sft": sft | {"add_tokens": ["<n>"]}}]}
    )
    with pytest.raises(InputError, match="stage sft adds other tokens than the first stage"):
        stages.make_staged_plan(stages.load_stage_inputs(other))


# ---------------------------------------------------------------- exports


def test_exports_hold_the_rows(first: Recipe, model: Path, tmp_path: Path) -> None:
    path = location(first)
    assert export_run(path, "peft", out=tmp_path / "peft").parity.mean_kl < 1e-9
    merged = export_run(path, "merged", out=tmp_path / "merged")
    assert (merged.parity.mean_kl < 1e-9, merged.parity.same_prompts) == (True, 4)
    old, new = (
        load_file(model / "model.safetensors"),
        load_file(tmp_path / "merged" / "model.safetensors"),
    )
    assert torch.equal(
        new["model.embed_tokens.weight"][:259], old["model.embed_tokens.weight"][:259]
    )
    size = json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"]
    assert (
        size
        == len(new["model.embed_tokens.weight"])
        == max(261, len(old["model.embed_tokens.weight"]))
    )
    rows = str(write_rows(tmp_path / "next.jsonl", marked(1, 6)))
    plan = plan_recipe(make_tiny_recipe(tmp_path / "merged", tmp_path / "next", data=rows))
    assert plan.model.vocab_size == size, "a model for the next run"
