"""Going on with an adapter: where it starts, what it proves, one step as PEFT takes it, and what it
belongs to."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import tunesmith
from tiny_runs import (
    build_sum_rows,
    make_chat_row,
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
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import CheckResult, Score
from tunesmith.core.json_io import read_json
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.session.identity import read_provenance
from tunesmith.session.reopen import load_trained_session
from tunesmith.session.session import open_session
from tunesmith.train import run
from tunesmith.train.preflight import run_preflight

pytestmark = [
    pytest.mark.promise,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
LEFT = {"lora_r": "auto"}  # the tiny recipe wishes for rank 2


def peft_adapter(model: Path, folder: Path, **config: Any) -> PeftModel:
    """An adapter far from zero, as PEFT saves it; returned as PEFT computes it."""
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "down_proj"],
    } | config
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = get_peft_model(base, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder)
    return network


@pytest.fixture(scope="module")
def first(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run; its recipe."""
    wish = make_tiny_recipe(tiny_folder, tmp_path_factory.mktemp("first"))
    train(wish)
    return wish


def new_rows(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(write_rows(folder / "new.jsonl", build_sum_rows(50, 4)))


# ---------------------------------------------------------------- the plan


def test_what_the_adapter_decides_is_in_the_plan(tiny_folder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_folder, tmp_path / "theirs", use_rslora=True)
    plan = plan_recipe(
        make_tiny_recipe(tiny_folder, tmp_path, adapter_from=str(tmp_path / "theirs"), **LEFT)
    )
    taken = {
        key: (choice.value, choice.decided_by)
        for key, choice in plan.settings.items()
        if choice.decided_by == "checkpoint"
    }
    assert taken.pop("adapter_sha256")
    assert taken == {
        "method": ("lora", "checkpoint"),
        "lora_r": (4, "checkpoint"),
        "lora_alpha": (6, "checkpoint"),
        "lora_target_modules": (("down_proj", "q_proj"), "checkpoint"),
        "use_rslora": (True, "checkpoint"),
        "use_dora": (False, "checkpoint"),
        "modules_to_save": ((), "checkpoint"),
    }
    assert plan.config.adapter_from == str(tmp_path / "theirs")
    assert "there is no hash of the weights" in plan.warnings[0]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"lora_r": 2}, "lora_r is 2 in the recipe and 4 in the adapter"),
        ({"lora_alpha": 32}, "lora_alpha is 32 in the recipe and 6 in the adapter"),
        (
            {"lora_target_modules": ["q_proj"]},
            "is q_proj in the recipe and down_proj, q_proj in the adapter",
        ),
        (
            {"lora_target_modules": "all-linear"},
            "is all-linear in the recipe and down_proj, q_proj in the adapter",
        ),
        ({"use_rslora": True}, "use_rslora is True in the recipe and False in the adapter"),
        ({"use_dora": True}, "use_dora is True in the recipe and False in the adapter"),
    ],
)
def test_a_contradiction_names_both_values(
    tiny_folder: Path, tmp_path: Path, wish: Any, message: str
) -> None:
    peft_adapter(tiny_folder, tmp_path / "theirs")
    with pytest.raises(InputError, match=message) as caught:
        plan_recipe(
            make_tiny_recipe(
                tiny_folder, tmp_path, adapter_from=str(tmp_path / "theirs"), **(LEFT | wish)
            )
        )
    assert caught.value.where == next(iter(wish))


def test_the_same_wish_is_no_contradiction(tiny_folder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_folder, tmp_path / "theirs")
    same = {
        "lora_r": 4,
        "lora_alpha": 6.0,
        "lora_target_modules": ["q_proj", "down_proj"],
        "use_rslora": False,
    }
    for targets in (["q_proj", "down_proj"], r".*\.(q|down)_proj"):
        wish = same | {"lora_target_modules": targets}
        assert (
            plan_recipe(
                make_tiny_recipe(
                    tiny_folder, tmp_path, adapter_from=str(tmp_path / "theirs"), **wish
                )
            ).config.lora_alpha
            == 6
        )


def test_full_training_goes_on_with_no_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_from has no effect with method: full"):
        make_tiny_recipe(tiny_folder, tmp_path, adapter_from="somewhere", method="full", **LEFT)


# ---------------------------------------------------------------- the start


def test_training_starts_from_the_adapters_weights(
    first: Recipe, tiny_folder: Path, tmp_path: Path
) -> None:
    """The first loss is that of the trained model, not of the base; dropping the adapter's weights
    would show."""
    rows = new_rows(tmp_path)
    fresh = select_steps(train(make_tiny_recipe(tiny_folder, tmp_path / "fresh", data=rows)))
    wish = make_tiny_recipe(
        tiny_folder,
        tmp_path / "more",
        data=rows,
        adapter_from=first.output_dir,
        learning_rate=1e-12,
    )
    more = select_steps(train(wish))
    assert more[0].loss < fresh[0].loss - 0.3
    start, end = (
        load_file(Path(str(r.output_dir)) / "adapter" / "adapter_model.safetensors")
        for r in (first, wish)
    )
    assert start.keys() == end.keys()
    assert all(torch.allclose(start[name], end[name], atol=1e-10) for name in start)


def test_the_start_is_proven_with_the_adapter_on(
    first: Recipe, tiny_folder: Path, tmp_path: Path
) -> None:
    wish = make_tiny_recipe(
        tiny_folder, tmp_path, data=new_rows(tmp_path), adapter_from=first.output_dir
    )
    run_inputs = inputs.load_inputs(wish)
    bench = open_session(planner.make_plan(run_inputs), run_inputs)
    assert "at most 0.0" in next(
        v.evidence
        for v in run_preflight(bench.model, bench.samples)
        if v.kind == "logits match transformers"
    )
    name, parameter = next(
        (n, p) for n, p in bench.model.network.named_parameters() if "lora_B" in n
    )
    with torch.no_grad():
        parameter *= 1.5  # an adapter that was not loaded as it is
    with pytest.raises(GateError, match="logits differ from transformers"):
        run_preflight(bench.model, bench.samples)
    assert name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_before_is_the_model_that_training_starts_from(
    first: Recipe, tiny_folder: Path, tmp_path: Path, dtype: str
) -> None:
    files = write_eval_files(tmp_path)
    wish = make_tiny_recipe(
        tiny_folder,
        tmp_path,
        adapter_from=first.output_dir,
        test_data=files["test_data"],
        dtype=dtype,
    )
    events = train(wish)
    before = next(e for e in events if isinstance(e, Score) and (e.metric, e.step) == ("loss", 0))
    base = train(
        make_tiny_recipe(
            tiny_folder, tmp_path / "base", test_data=files["test_data"], dtype=dtype, max_steps=1
        )
    )
    of_base = next(e for e in base if isinstance(e, Score) and (e.metric, e.step) == ("loss", 0))
    assert before.value < of_base.value - 0.3
    again = {c.metric: c for c in tunesmith.evaluate(Path(str(wish.output_dir))).comparisons}
    assert again["loss"].before.value == pytest.approx(before.value, rel=1e-6)


# ---------------------------------------------------------------- steps


def their_step(network: PeftModel, documents: Any, plan: Any) -> dict[str, torch.Tensor]:
    """One step of PEFT and torch's AdamW on whole documents, each computed alone; the loss is the
    mean over targets."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=plan.config.learning_rate, weight_decay=plan.config.weight_decay
    )
    count = sum(float(document.weights_L.sum()) for document in documents)
    for document in documents:
        tokens = torch.from_numpy(document.tokens_L).long()
        logits = network(input_ids=tokens[None, :-1]).logits[0]
        losses = cross_entropy(logits, tokens[1:], reduction="none")
        ((losses * torch.from_numpy(document.weights_L[1:])).sum() / count).backward()
    torch.nn.utils.clip_grad_norm_(trained, plan.config.max_grad_norm)
    optimizer.step()
    named = {
        n.replace(".default", ""): p.detach()
        for n, p in network.named_parameters()
        if p.requires_grad
    }
    return {
        n.replace("magnitude_vector.weight", "magnitude_vector"): p for n, p in named.items()
    }  # as PEFT saves it


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True, "target_modules": "all-linear"}, {"use_dora": True}]
)
def test_one_step_from_pefts_adapter_is_pefts_step(
    tiny_folder: Path, tmp_path: Path, config: dict
) -> None:
    network = peft_adapter(tiny_folder, tmp_path / "theirs", **config)
    wish = make_tiny_recipe(
        tiny_folder,
        tmp_path,
        adapter_from=str(tmp_path / "theirs"),
        batch_size=6,
        max_steps=1,
        **LEFT,
    )
    run_inputs = inputs.load_inputs(wish)
    plan = planner.make_plan(run_inputs)
    expected = their_step(network, open_session(plan, run_inputs).load_documents(1), plan)
    events = list(run.train(plan, run_inputs))
    assert len(select_steps(events)) == 1
    start = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
        tmp_path / "run" / "adapter",
    )
    tokens = torch.arange(30)[None]
    network.eval()
    torch.testing.assert_close(theirs(tokens).logits, network(tokens).logits, rtol=1e-3, atol=1e-3)


def test_a_continued_run_resumes_bitwise(first: Recipe, tiny_folder: Path, tmp_path: Path) -> None:
    rows = new_rows(tmp_path)
    wishes = [
        make_tiny_recipe(
            tiny_folder,
            tmp_path / name,
            data=rows,
            adapter_from=first.output_dir,
            save_steps=1,
            num_train_epochs=2,
        )
        for name in ("straight", "broken")
    ]
    train(wishes[0])
    run_inputs = inputs.load_inputs(wishes[1])
    run_until_saved(iter(run.train(planner.make_plan(run_inputs), run_inputs)), 2)
    list(run.resume(tmp_path / "broken" / "run"))
    assert read_adapter_bytes(wishes[0]) == read_adapter_bytes(wishes[1])


def test_a_changed_start_is_noticed(tiny_folder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_folder, tmp_path / "theirs")
    wish = make_tiny_recipe(
        tiny_folder, tmp_path, adapter_from=str(tmp_path / "theirs"), save_steps=1, **LEFT
    )
    run_inputs = inputs.load_inputs(wish)
    plan = planner.make_plan(run_inputs)
    run_until_saved(iter(run.train(plan, run_inputs)), 1)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match="the adapter has changed since the plan"):
        inputs.reload_inputs(plan)
    with pytest.raises(InputError, match="adapter_from"):
        list(run.resume(tmp_path / "run"))


def test_a_finished_run_answers_without_the_adapter_it_started_from(
    tiny_folder: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_folder, tmp_path / "theirs")
    train(make_tiny_recipe(tiny_folder, tmp_path, adapter_from=str(tmp_path / "theirs"), **LEFT))
    shutil.rmtree(tmp_path / "theirs")
    assert isinstance(next(tunesmith.chat(tmp_path / "run", ["1 and 1"])), str)
    with pytest.raises(InputError, match="no adapter in this folder"):
        tunesmith.evaluate(tmp_path / "run")


# ---------------------------------------------------------------- what it belongs to


def test_fault_20_an_adapter_of_another_base_is_refused(first: Recipe, tmp_path: Path) -> None:
    other = save_model_folder(tmp_path / "other", seed=5)
    with pytest.raises(
        InputError, match=r"base weights model\.safetensors: sha256 \w{12} -> \w{12}"
    ) as caught:
        plan_recipe(make_tiny_recipe(other, tmp_path, adapter_from=first.output_dir))
    assert caught.value.where.endswith("tunesmith.json")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_changed_byte_of_the_adapter_is_refused_by_file(
    name: str, first: Recipe, tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(Path(str(first.output_dir)) / "adapter", adapter)
    content = bytearray((adapter / name).read_bytes())
    position = content.index(b'"lora_alpha": ') + 14 if name.endswith(".json") else -3
    content[position] ^= 1
    (adapter / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} was changed: its sha256") as caught:
        plan_recipe(make_tiny_recipe(tiny_folder, tmp_path, adapter_from=adapter))
    assert caught.value.fix.endswith("remove its manifest.json")
    (adapter / "manifest.json").unlink()
    plan_recipe(make_tiny_recipe(tiny_folder, tmp_path, adapter_from=adapter))


def test_an_adapter_of_another_template_says_how_to_go_on(
    first: Recipe, tiny_folder: Path, tmp_path: Path
) -> None:
    template = tmp_path / "other.jinja"
    template.write_text((tiny_folder / "chat_template.jinja").read_text() + "{# another #}")
    with pytest.raises(InputError, match="chat template default: sha256") as caught:
        plan_recipe(
            make_tiny_recipe(
                tiny_folder, tmp_path, adapter_from=first.output_dir, chat_template=str(template)
            )
        )
    provided = str(caught.value.fix).rpartition("template: ")[2]
    assert (
        plan_recipe(
            make_tiny_recipe(
                tiny_folder, tmp_path, adapter_from=first.output_dir, chat_template=provided
            )
        ).steps
        == 3
    )


def test_an_adapter_folder_says_what_it_belongs_to(first: Recipe, tiny_folder: Path) -> None:
    folder = Path(str(first.output_dir)) / "adapter"
    actual = read_provenance(folder)
    assert actual is not None
    assert (actual.base, list(actual.base_sha256)) == (str(tiny_folder), ["model.safetensors"])
    assert actual.end_ids == (257, 258)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [257, 258]
    assert (folder / "chat_template.jinja").read_text() == (
        tiny_folder / "chat_template.jinja"
    ).read_text()
    assert len(actual.reference_prompts) == 5, (
        "plain text, a question, one with a system message, a conversation, a tool call"
    )
    assert actual.now == read_json(folder.parent / "plan.json")["settings"]["now"]["value"]
    full = (folder / "tunesmith.json").read_text()
    assert "please" not in full, "no row of the data"


def test_reopening_says_what_differs(tiny_folder: Path, tmp_path: Path) -> None:
    wish = make_tiny_recipe(shutil.copytree(tiny_folder, tmp_path / "model"), tmp_path)
    train(wish)
    assert next(tunesmith.chat(tmp_path / "run", ["1 and 1"])) is not None
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<|start|>"}))
    with pytest.raises(InputError, match="names of special tokens: sha256"):
        load_trained_session(tmp_path / "run")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# more #}")
    save_model_folder(tmp_path / "model2", seed=3)
    shutil.copy(tmp_path / "model2" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError) as caught:
        load_trained_session(tmp_path / "run")
    lines = caught.value.message.splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "base weights model.safetensors",
        "chat template default",
    ]


def test_reference_prompts_detect_another_tokenization_by_the_same_files(
    first: Recipe, tmp_path: Path
) -> None:
    wish = first.model_copy(update={"output_dir": tmp_path / "copy"})
    shutil.copytree(Path(str(first.output_dir)), tmp_path / "copy")
    file = tmp_path / "copy" / "adapter" / "tunesmith.json"
    content = read_json(file)
    content["reference_prompts"][1]["token_ids"][5] += 1
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"not as the run wrote it: tunesmith\.json"):
        load_trained_session(tmp_path / "copy")
    (tmp_path / "copy" / "adapter" / "manifest.json").unlink()
    with pytest.raises(
        InputError, match=r"reference prompt 2: \d+ tokens -> \d+, different from token 6 on"
    ):
        plan_recipe(
            make_tiny_recipe(
                Path(wish.model),
                tmp_path / "new",
                adapter_from=tmp_path / "copy",
                data=new_rows(tmp_path),
            )
        )


def test_a_verdict_or_two_for_the_record(first: Recipe, tiny_folder: Path, tmp_path: Path) -> None:
    row = [make_chat_row("a question", "an answer")]
    rows = str(write_rows(tmp_path / "one.jsonl", row * 2))
    events = train(
        make_tiny_recipe(tiny_folder, tmp_path / "n", data=rows, adapter_from=first.output_dir)
    )
    kinds = [v.kind for v in events if isinstance(v, CheckResult)]
    assert "logits match transformers" in kinds
    record = read_json(tmp_path / "n" / "run" / "record.json")
    assert record["plan"]["settings"]["adapter_from"]["value"] == str(
        Path(str(first.output_dir)) / "adapter"
    )
