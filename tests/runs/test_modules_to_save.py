"""A run that trains modules in full beside its adapter, and runs that start from PEFT's adapters
with modules, ranks and alphas of their own: the plan, the proof, resume, evaluation and exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import tunesmith
from tiny_export import save_model, save_run
from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    save_model_folder,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.types import Json, Pack
from tunesmith.data.collate import collate
from tunesmith.evaluate.compare_models import EvalSpec, evaluate_before_after
from tunesmith.evaluate.model_ref import parse_model_ref
from tunesmith.export.export import export_run
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.session.reopen import load_trained_session
from tunesmith.train import run

pytestmark = [
    pytest.mark.promise,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning"),
]  # PEFT's
MODULES = ["embed_tokens", "lm_head", "norm", "layers.0.mlp"]
NUM_VALUES = {True: 0, False: 259 * 32}  # of the head, unless it is tied


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    """Return a recipe that trains the modules and generates no answers."""
    values = {"modules_to_save": MODULES, "metrics": ["bits_per_byte"], **write_eval_files(folder)}
    return make_tiny_recipe(model, folder, **(values | changed))


def location(recipe: Recipe) -> Path:
    return Path(str(recipe.output_dir))


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model_folder(tmp_path_factory.mktemp("tied"))
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tiny_folder: Path, tied_folder: Path) -> Path:
    return tied_folder if request.param == "tied" else tiny_folder


def is_tied(model: Path) -> bool:
    return json.loads((model / "config.json").read_text())["tie_word_embeddings"]


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run; its recipe."""
    recipe = wish(model, tmp_path_factory.mktemp("first"))
    train(recipe)
    return recipe


# ---------------------------------------------------------------- the plan


def test_the_plan_counts_the_modules(model: Path, tmp_path: Path) -> None:
    plan = plan_recipe(wish(model, tmp_path / "a"))
    assert plan.config.modules_to_save == tuple(MODULES)
    without = plan_recipe(wish(model, tmp_path / "b", modules_to_save="auto"))
    assert without.config.modules_to_save == ()
    values = 259 * 32 + NUM_VALUES[is_tied(model)] + 3 * 32 * 48 + 5 * 32
    trained = plan.memory_bytes["trained"] - without.memory_bytes["trained"]
    assert trained == values * 16, "master, gradient and two moments in fp32"
    assert plan.disk_bytes > without.disk_bytes + values * 12


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modules_to_save": ["emb"]}, "no module with weights has a path that ends in emb"),
        ({"method": "qlora"}, "method: qlora keeps model.layers.0.mlp.[a-z]+_proj in 4 bits"),
        (
            {"lora_target_modules": ["up_proj"]},
            "is in lora_target_modules and in modules_to_save",
        ),
        (
            {"modules_to_save": ["mlp", "self_attn"]},
            "trains every layer in full that would have an adapter",
        ),
    ],
)
def test_modules_that_cannot_be_trained_are_refused_by_the_plan(
    tiny_folder: Path, tmp_path: Path, changed: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan_recipe(wish(tiny_folder, tmp_path, **changed))
    assert caught.value.fix


def test_full_training_has_no_modules_to_save(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="modules_to_save has no effect with method: full"):
        wish(tiny_folder, tmp_path, method="full", lora_r="auto")


# ---------------------------------------------------------------- the run


def assert_equal_to_peft(path: Path, base: Path) -> None:
    network: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), path / "adapter"
    ).eval()
    session = load_trained_session(path)
    document = session.rows.render_documents(0)[0]
    batch = collate(Pack((document,)))
    with torch.no_grad():
        ours = session.model.head.compute_logits(session.model.compute_hidden(batch))
        tokens = torch.from_numpy(document.tokens_L).long()
        theirs = network(input_ids=tokens[None]).logits[0, batch.positions_S]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_peft_answers_as_the_run_does(first: Recipe, model: Path) -> None:
    assert_equal_to_peft(location(first), model)
    stored = load_file(location(first) / "adapter" / "adapter_model.safetensors")
    base = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert not torch.equal(stored[f"base_model.model.{name}"], base[name]), "trained"


def test_a_resumed_run_has_the_same_bytes(first: Recipe, model: Path, tmp_path: Path) -> None:
    recipe = wish(model, tmp_path, save_steps=1)
    run_inputs = inputs.load_inputs(recipe)
    run_until_saved(run.train(planner.make_plan(run_inputs), run_inputs), 1)
    list(run.resume(location(recipe)))
    assert read_adapter_bytes(recipe) == read_adapter_bytes(first)


def test_it_is_measured_against_the_base(first: Recipe) -> None:
    """Before, after and the divergence at scale 0 are those of a second evaluation."""
    path = location(first)
    record = json.loads((path / "record.json").read_text())
    before = {item["metric"]: item["before"]["value"] for item in record["comparisons"]}
    again = {item.metric: item for item in tunesmith.evaluate(path).comparisons}
    assert again["loss"].before.value == pytest.approx(before["loss"], rel=1e-6)
    assert again["loss"].after.value < again["loss"].before.value - 0.1
    scales = {point["scale"]: point["eval_loss"]["value"] for point in record["scales"]}
    assert scales[0.0] > scales[1.0]
    assert len(set(scales.values())) == 5


def test_a_run_continues_from_its_modules(first: Recipe, model: Path, tmp_path: Path) -> None:
    start = {"adapter_from": str(location(first)), "lora_r": "auto", "learning_rate": 1e-12}
    recipe = wish(model, tmp_path / "on", **start)
    assert plan_recipe(recipe).config.modules_to_save == tuple(MODULES)
    left_open = plan_recipe(wish(model, tmp_path / "open", **start, modules_to_save="auto"))
    assert left_open.config.modules_to_save is not None
    assert "norm" in left_open.config.modules_to_save
    events = train(recipe)
    proof = [e for e in events if isinstance(e, CheckResult) and e.level == "ok"]
    assert any("logits match transformers" in e.kind for e in proof)
    trained, more = (
        load_file(location(item) / "adapter" / "adapter_model.safetensors")
        for item in (first, recipe)
    )
    assert trained.keys() == more.keys()
    assert all(torch.allclose(trained[name], more[name], atol=1e-9) for name in trained)
    with pytest.raises(InputError, match="modules_to_save is norm in the recipe"):
        plan_recipe(wish(model, tmp_path / "other", **start, modules_to_save=["norm"]))


def test_pairs_are_compared_with_the_base(tiny_folder: Path, tmp_path: Path) -> None:
    """DPO's reference has the base's modules: the first loss is that of no change."""
    rows: list[Json] = [
        {"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(6)
    ]
    pairs = {"data": str(write_rows(tmp_path / "pairs.jsonl", rows)), "stage": "preference"}
    recipe = make_tiny_recipe(
        tiny_folder, tmp_path, **pairs, loss={"nll_coefficient": 0}, modules_to_save=MODULES
    )
    steps = select_steps(train(recipe))
    assert steps[0].loss == pytest.approx(0.6931, abs=1e-4)
    assert steps[-1].loss < steps[0].loss


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_norms_and_head_of_a_quantized_base_are_trained(
    tiny_folder: Path, tmp_path: Path, dtype: str
) -> None:
    modules = ["embed_tokens", "lm_head", "norm"]
    recipe = wish(tiny_folder, tmp_path, method="qlora", modules_to_save=modules, dtype=dtype)
    train(recipe)
    assert export_run(location(recipe), "merged").parity.mean_kl < 1e-2


def test_a_bf16_run_trains_and_continues(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = wish(tiny_folder, tmp_path / "a", dtype="bf16", attention="auto")
    train(recipe)
    assert export_run(location(recipe), "merged").parity.mean_kl < 1e-3
    start = {"adapter_from": str(location(recipe)), "lora_r": "auto", "dtype": "bf16"}
    train(wish(tiny_folder, tmp_path / "b", **start, attention="auto"))


# ---------------------------------------------------------------- exports


@pytest.mark.parametrize("scale", [1, 0.5])
def test_exports_hold_the_modules(first: Recipe, model: Path, tmp_path: Path, scale: float) -> None:
    path = location(first)
    for target in ("peft", "merged"):
        result = export_run(path, target, out=tmp_path / target, scale=scale)
        assert result.parity.mean_kl < 1e-8, target
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, peft(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_holds_them(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "model", family)
    path = save_run(tmp_path / "run", model, modules_to_save=["embed_tokens", "norm", "v_proj"])
    assert export_run(path, "gguf", kind="f32").parity.mean_kl < 1e-8


def test_a_gguf_holds_layers_of_other_ranks_and_scales(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    save_peft_adapter(model, tmp_path / "theirs", PEFT_CONFIGS["patterns"])
    path = save_run(tmp_path / "run", model, adapter_from=str(tmp_path / "theirs"), lora_r="auto")
    assert export_run(path, "gguf", kind="f32").parity.mean_kl < 1e-8


# ---------------------------------------------------------------- adapters of PEFT

PEFT_CONFIGS: dict[str, Json] = {
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*_proj": 3},
        "alpha_pattern": {"o_proj": 30, "up_proj": 1.5},
    },
    "patterns and modules": {
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 3},
        "modules_to_save": ["embed_tokens", "input_layernorm"],
    },
}


@pytest.fixture(scope="module", params=PEFT_CONFIGS, ids=PEFT_CONFIGS)
def foreign(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Json]:
    config = PEFT_CONFIGS[request.param]
    folder = tmp_path_factory.mktemp("foreign")
    save_peft_adapter(tiny_folder, folder, config)
    return folder, config


def save_peft_adapter(model: Path, folder: Path, config: Json) -> None:
    """Save an adapter far from zero with PEFT."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings: Json = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    network = get_peft_model(base, LoraConfig(**(settings | config)))
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder)


def test_a_run_starts_from_it_and_its_results_are_read_by_peft(
    tiny_folder: Path, foreign: tuple[Path, Json], tmp_path: Path
) -> None:
    """Preflight compares the start with the stock model and the adapter as PEFT computes it."""
    folder, config = foreign
    recipe = wish(
        tiny_folder,
        tmp_path,
        adapter_from=str(folder),
        lora_r="auto",
        modules_to_save="auto",
    )
    plan = plan_recipe(recipe)
    assert bool(plan.config.rank_pattern) == ("rank_pattern" in config)
    train(recipe)
    assert_equal_to_peft(location(recipe), tiny_folder)
    for target in ("peft", "merged"):
        export_run(location(recipe), target)


def test_it_is_evaluated_as_peft_computes_it(
    tiny_folder: Path, foreign: tuple[Path, Json], tmp_path: Path
) -> None:
    folder, _ = foreign
    content = json.loads((folder / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = str(tiny_folder)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    data = write_rows(tmp_path / "rows.jsonl", build_sum_rows(5, 4))
    spec = EvalSpec(data=data)
    evaluation = evaluate_before_after(parse_model_ref(str(folder)), spec)
    before_after = {item.metric: item for item in evaluation.comparisons}
    base = make_tiny_recipe(tiny_folder, tmp_path / "base", test_data=str(data))
    documents = inputs.load_inputs(base).datasets["test_data"]
    stock = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    network: Any = PeftModel.from_pretrained(stock, folder).eval()
    losses: list[float] = []
    for index in range(4):
        document = documents.render_documents(index)[0]
        tokens = torch.from_numpy(document.tokens_L).long()
        with torch.no_grad():
            logits = network(input_ids=tokens[None, :-1]).logits[0]
        nats = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        weights = torch.from_numpy(document.weights_L[1:])
        losses.append(float((nats * weights).sum() / weights.sum()))
    expected = sum(losses) / len(losses)
    assert before_after["loss"].after.value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([97, 98], "of tokens that the base already has: 'a', 'b'"),
        ([97, 99], "not consecutive token ids"),
    ],
)
def test_rows_of_tokens_that_the_base_has_are_refused_with_a_way_out(
    tiny_folder: Path, tmp_path: Path, indices: list[int], message: str
) -> None:
    config = {"target_modules": ["q_proj"], "trainable_token_indices": indices}
    letters = [token - 97 for token in indices]
    ids = inputs.load_inputs(wish(tiny_folder, tmp_path / "w")).renderer.tokenizer
    config["trainable_token_indices"] = [ids.token_to_id(chr(97 + n)) for n in letters]
    save_peft_adapter(tiny_folder, tmp_path / "theirs", config)
    start = {"adapter_from": str(tmp_path / "theirs"), "lora_r": "auto"}
    with pytest.raises(InputError, match=message) as caught:
        plan_recipe(wish(tiny_folder, tmp_path, **start, modules_to_save="auto"))
    assert "merge_and_unload" in caught.value.fix
