"""Every key of the recipe has a case here: changing it changes what a run does."""

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load

import compute_keys
import evaluation_keys
import objective_keys
from tiny_recipe_runs import Baseline, Lab
from tiny_runs import (
    build_sum_rows,
    make_chat_row,
    read_adapter_bytes,
    save_model_folder,
    select_steps,
    write_eval_files,
)
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckpointSaved, CheckResult, Score, TrainStep
from tunesmith.core.json_io import read_json
from tunesmith.model.hub.validate import read_header
from tunesmith.recipe.schema import KEYS
from tunesmith.session import inputs, planner
from tunesmith.session.reopen import load_trained_session

pytestmark = pytest.mark.promise


TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

WITHOUT_ANSWERS: dict[str, Any] = {"metrics": ["bits_per_byte"]}  # generating them takes longest


@pytest.fixture(scope="module")
def baseline(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    return Lab(tiny_folder, tmp_path_factory.mktemp("baseline")).run_baseline()


@pytest.fixture
def lab(tiny_folder: Path, tmp_path: Path, baseline: Baseline) -> Lab:
    return Lab(tiny_folder, tmp_path, baseline)


def losses(steps: list[TrainStep]) -> list[float]:
    return [step.loss for step in steps]


def changes_the_adapter(lab: Lab, key: str, value: Any, **both: Any) -> None:
    unchanged = lab.adapter(**both) if both else lab.baseline.adapter
    assert unchanged != lab.adapter(**both, **{key: value})


# ---------------------------------------------------------------- what is trained


def model(lab: Lab) -> None:
    first = lab.baseline.steps
    lab.model = save_model_folder(lab.folder / "other", seed=1)
    assert lab.steps()[0].loss != first[0].loss


def method(lab: Lab) -> None:
    lab.events()
    assert (lab.output / "adapter").exists()
    lab.events(method="full", lora_r="auto")
    assert (lab.output / "model").exists()
    assert not (lab.output / "adapter").exists()
    changes_the_adapter(lab, "method", "qlora", learning_rate=0.1)


def adapter_from(lab: Lab) -> None:
    first = lab.steps(learning_rate=0.1)
    again = lab.steps(adapter_from=str(lab.output))
    assert again[0].loss < 0.9 * first[0].loss, "starts from what was learnt"


def stage(lab: Lab) -> None:
    both = lab.steps(stage="preference", data=choices(lab))
    chosen = lab.steps(stage="sft", data=choices(lab))
    assert both[0].supervised_tokens > chosen[0].supervised_tokens, "the rejected answers count too"
    texts = {
        "data": lab.rows([{"text": "one"}, {"text": "three"}]),
        "max_length": 8,
        "batch_size": "auto",
    }
    (step,) = lab.steps(**texts, stage="pt", batch_tokens=20)  # an alias of cpt
    assert step.supervised_tokens == len("onethree"), (
        "with an end of the text each, and without the first"
    )
    with pytest.raises(ValidationError, match="stage"):
        lab.events(stage="rlhf")


def choices(lab: Lab) -> str:
    """Preference rows: a right sum, and a wrong one."""
    rows = [
        {"prompt": f"{n} and {n}", "chosen": f"{2 * n}", "rejected": f"no {n}"} for n in range(1, 7)
    ]
    return lab.rows(rows, "pairs.jsonl")


def loss(lab: Lab) -> None:
    pairs = {"stage": "preference", "data": choices(lab)}
    results = {
        name: lab.steps(**pairs, loss=name)[0].loss for name in ("auto", "dpo", "orpo", "simpo")
    }
    assert results["auto"] == results["dpo"]
    assert len(set(results.values())) == 3
    with pytest.raises(ValidationError, match="loss has no effect without stage: preference"):
        lab.events(loss="dpo")
    assert lab.steps(**pairs, loss={"name": "simpo", "beta": 4})[0].loss != results["simpo"]
    margin = lab.steps(**pairs, loss={"name": "simpo", "gamma": 9})[0].loss
    assert results["simpo"] < margin, "a margin is harder to reach"
    with pytest.raises(ValidationError, match="gamma has no effect with orpo"):
        lab.events(**pairs, loss={"name": "orpo", "gamma": 1})
    some, more = (lab.steps(**pairs, loss={"nll_coefficient": value})[0].loss for value in (1, 2))
    log_2 = 0.693147  # of a fresh adapter
    assert more - some == pytest.approx(some - log_2, rel=1e-4)


# ---------------------------------------------------------------- on what


def data(lab: Lab) -> None:
    files = [lab.rows(build_sum_rows(1, 2), "a.jsonl"), lab.rows(build_sum_rows(7, 3), "b.jsonl")]
    plain = lab.steps(data=files, batch_size=5)
    limited = lab.steps(data=[files[0], {"path": files[1], "max_examples": 1}], batch_size=5)
    assert [
        plain[0].supervised_tokens > limited[0].supervised_tokens,
        len(plain),
        len(limited),
    ] == [True, 1, 1]
    row = [{"messages": make_chat_row("a", "b")["messages"], "text": "plain"}]
    as_text = lab.steps(data=[{"path": lab.rows(row), "format": "text"}], batch_size=1)
    as_chat = lab.steps(data=[{"path": lab.rows(row), "format": "messages"}], batch_size=1)
    assert as_text[0].tokens != as_chat[0].tokens
    with pytest.raises(ValidationError, match="format"):
        lab.events(data=[{"path": files[0], "format": "parquet"}])
    pairs = lab.rows([{"q": "one", "a": "two", "b": "three"}], "pairs.jsonl")
    mapped = [
        lab.steps(data=[{"path": pairs, "columns": {"prompt": "q", "completion": key}}])[0]
        for key in "ab"
    ]
    assert [step.supervised_tokens for step in mapped] == [len("two") + 1, len("three") + 1]
    facts_file = lab.rows([{"n": n, "completion": str(n)} for n in range(4)], "facts.jsonl")
    facts_source = {"path": facts_file, "name": "numbers"}
    short, long = (
        lab.steps(data=[facts_source | {"prompts": prompt}], batch_size=4)[0]
        for prompt in ("{n}", "the number {n}")
    )
    assert long.tokens - short.tokens == 4 * len("the number ")
    assert short.task_tokens == {"numbers": short.tokens}
    weights = [
        lab.steps(data=[files[0], {"path": files[1], "weight": w}], batch_size=5)[0].loss
        for w in (1, 100)
    ]
    alone = lab.steps(data=files[1], batch_size=5)[0].loss
    assert abs(weights[1] - alone) < 0.1 * abs(weights[0] - alone)


def eval_data(lab: Lab) -> None:
    assert "eval_data" not in lab.plan().data
    files = write_eval_files(lab.folder)
    assert (
        lab.scores(eval_data=files["eval_data"], test_data=files["test_data"])["eval", "loss"].n
        == 3
    )


def eval_split(lab: Lab) -> None:
    rows = lab.rows(build_sum_rows(1, 40))
    assert lab.plan(data=rows, batch_size=1).steps == 40
    events = lab.events(data=rows, batch_size=1, eval_split=0.5)
    held_out = {event.task: event.n for event in events if isinstance(event, Score)}
    assert min(held_out.values()) >= 2
    assert len(select_steps(events)) + held_out["eval"] + held_out["test"] == 40


def held_out_data(lab: Lab) -> None:
    assert "test_data" not in lab.plan().data
    assert lab.scores(test_data=lab.rows(build_sum_rows(90, 4)))["test", "field_f1"].n == 4
    scores = lab.scores(eval_data=lab.rows(build_sum_rows(90, 4)), test_data="none")
    assert ("test", "loss") not in scores
    assert scores["eval", "loss"].n == 4


def retention_data(lab: Lab) -> None:
    assert ("general text", "bits_per_byte") not in lab.scores(retention_data="none")
    assert lab.scores(retention_data="built-in")["general text", "bits_per_byte"].n == 80
    texts = lab.rows([{"text": "some text"}, {"text": "and more"}])
    assert lab.scores(retention_data=texts)["general text", "bits_per_byte"].n == 2


def rehearsal(lab: Lab) -> None:
    texts = lab.rows([{"text": f"some text {n}"} for n in range(30)], "texts.jsonl")
    chats = lab.rows(build_sum_rows(50, 30), "chats.jsonl")

    def shares(**options: Any) -> list[float]:
        steps = lab.steps(rehearsal=options, batch_size=6, num_train_epochs=5)
        return [
            sum(step.task_tokens.get("rehearsal", 0) for step in steps)
            / sum(step.tokens for step in steps)
        ]

    assert not any(step.task_tokens for step in lab.baseline.steps)
    results = [
        shares(data=texts, **options)[0]
        for options in ({}, {"ratio": 0.5}, {"shift": "language"}, {"shift": "style"})
    ]
    assert results == pytest.approx([0.1, 0.5, 0.25, 0.01], abs=0.02)
    as_texts, as_chats = (
        lab.adapter(rehearsal={"data": file, "ratio": 0.5}) for file in (texts, chats)
    )
    assert as_texts != as_chats


def mixture(lab: Lab) -> None:
    files = [lab.rows(build_sum_rows(1, 8), "a.jsonl"), lab.rows(build_sum_rows(20, 2), "b.jsonl")]

    def taken(**options: Any) -> Counter[str]:
        steps = lab.steps(data=files, mixture=options, batch_size=1)
        return Counter(task for step in steps for task in step.task_tokens)

    assert taken() == {"a": 8, "b": 2}
    assert taken(limit=4) == {"a": 4, "b": 2}
    assert taken(temperature=1000) == {"a": 5, "b": 5}
    with pytest.raises(ValidationError, match="mixture has no effect with stage: cpt"):
        lab.events(stage="cpt", batch_size="auto", mixture={})


def never(lab: Lab) -> None:
    rows = lab.rows(
        [
            *build_sum_rows(1, 6),
            make_chat_row("more", "as an AI I cannot"),
            make_chat_row("less", "I am an AI too"),
        ]
    )
    assert [lab.plan(data=rows, never=never).steps for never in ([], [{"match": "an AI"}])] == [
        4,
        3,
    ]
    stored, banned = (
        lab.adapter(data=rows, never=[{"match": "an AI", "mode": mode}])
        for mode in ("filter", "ban")
    )
    assert stored != banned
    plan = planner.make_plan(inputs.load_inputs(lab.last))
    assert plan.config.never == ("an AI (ban)",)
    with pytest.raises(ValidationError, match="mode ban has no effect with stage: preference"):
        lab.events(data=choices(lab), stage="preference", never=[{"match": "a", "mode": "ban"}])


def max_examples(lab: Lab) -> None:
    assert [lab.plan(max_examples=count).steps for count in (None, 2)] == [3, 1]


def skip_invalid(lab: Lab) -> None:
    rows = lab.rows([*build_sum_rows(1, 6), make_chat_row("question", " ")])
    with pytest.raises(InputError, match="1 of 7 rows cannot be used: 1 empty answer"):
        lab.events(data=rows)
    assert lab.plan(data=rows, skip_invalid=True).steps == 3


def chat_template(lab: Lab) -> None:
    template_file = lab.folder / "own.jinja"
    template_file.write_text(TEMPLATE)
    stock = lab.steps(batch_size=6)
    changed = lab.steps(batch_size=6, chat_template=str(template_file))
    assert stock[0].tokens == changed[0].tokens + 6 * 4, "four line ends a row"
    assert (lab.output / "adapter" / "chat_template.jinja").read_text() == template_file.read_text()
    text = lab.rows([{"text": "one"}, {"text": "three"}])
    assert lab.steps(data=text, chat_template="none")[0].tokens == len("onethree") + 2


def chat_template_kwargs(lab: Lab) -> None:
    template_file = lab.folder / "own.jinja"
    template_file.write_text("{% if tone is defined %}{{ tone }}{% endif %}" + TEMPLATE)
    plain, with_variable = (
        lab.steps(chat_template=str(template_file), batch_size=6, chat_template_kwargs=options)
        for options in ({}, {"tone": "calm"})
    )
    assert with_variable[0].tokens == plain[0].tokens + 6 * len("calm")
    with pytest.raises(InputError, match="does not use ton\n  fix: did you mean tone"):
        lab.steps(chat_template=str(template_file), chat_template_kwargs={"ton": "calm"})
    with pytest.raises(InputError, match="messages cannot be set"):
        lab.steps(chat_template=str(template_file), chat_template_kwargs={"messages": []})


def add_tokens(lab: Lab) -> None:
    rows = lab.rows([make_chat_row(f"<n>{n}", f"<sum>{n}") for n in range(6)])
    plain, added = lab.steps(data=rows), lab.steps(data=rows, add_tokens="<n>,<sum>")
    assert plain[0].tokens - added[0].tokens == 2 * (len("<n>") + len("<sum>") - 2), (
        "of two rows, one id each"
    )
    names = read_header(lab.output / "adapter" / "adapter_model.safetensors")
    assert sum("trainable_tokens" in name for name in names) == 2, "embedding and head"
    with pytest.raises(InputError, match="is already one token"):
        lab.events(add_tokens=["a"])


def response_schema(lab: Lab) -> None:
    path = lab.folder / "schema.json"
    path.write_text('{"type": "object", "required": ["sum"]}')
    test = lab.rows(build_sum_rows(90, 3))
    assert ("test", "schema_valid") not in lab.scores(test_data=test)
    assert ("test", "schema_valid") in lab.scores(test_data=test, response_schema=str(path))


# ---------------------------------------------------------------- lengths and steps


def max_length(lab: Lab) -> None:
    short = lab.steps(max_length=45, skip_invalid=True)
    assert sum(step.tokens for step in lab.baseline.steps) > sum(step.tokens for step in short) > 0


def on_overlong(lab: Lab) -> None:
    rows = lab.rows(
        [make_chat_row("question", "long answer " * 9), make_chat_row("question", "answer")]
    )
    short = {"data": rows, "max_length": 60, "skip_invalid": True}
    dropped, cut = (lab.steps(**short, on_overlong=policy)[0] for policy in ("drop", "truncate"))
    assert dropped.tokens < 60 < cut.tokens
    with pytest.raises(InputError, match="max_length is 60"):
        lab.events(data=rows, max_length=60, on_overlong="refuse")


def pack_length(lab: Lab) -> None:
    bench = {
        length: lab.steps(batch_size=6, pack_length=length, num_train_epochs=2)
        for length in (60, 512)
    }
    assert bench[60][0].loss == pytest.approx(bench[512][0].loss, rel=1e-6)
    assert bench[60][1].loss == pytest.approx(bench[512][1].loss, rel=1e-4)
    predicted = [
        read_json(lab.folder / str(n) / "run" / "plan.json")["memory_bytes"]["activations"]
        for n in (1, 2)
    ]
    assert predicted[0] < predicted[1], "less is computed side by side"


def share_prefixes(lab: Lab) -> None:
    rows = lab.rows(
        [make_chat_row(f"{n} and {n}", f"{2 * n}", "Add the two numbers.") for n in range(1, 7)]
    )
    plain, shared = (lab.steps(data=rows, share_prefixes=value) for value in (False, True))
    assert losses(shared) == pytest.approx(losses(plain), rel=1e-4)
    assert not any(step.shared_tokens for step in plain)
    assert all(step.shared_tokens > len("Add the two numbers.") for step in shared)
    with pytest.raises(ValidationError, match="share_prefixes contradicts lora_dropout"):
        lab.events(share_prefixes=True, lora_dropout=0.1)


def batch_size(lab: Lab) -> None:
    assert [lab.plan(batch_size=size).steps for size in (1, 4)] == [6, 2]


def batch_tokens(lab: Lab) -> None:
    texts = {
        "data": lab.rows([{"text": f"text number {n}"} for n in range(10, 30)]),
        "batch_size": "auto",
    }
    cpt = texts | {"stage": "cpt", "max_length": 20}
    assert [lab.plan(**cpt, batch_tokens=count).steps for count in (100, 150)] == [3, 2]
    with pytest.raises(ValidationError, match="batch_tokens has no effect without stage: cpt"):
        lab.events(batch_tokens=100)


def num_train_epochs(lab: Lab) -> None:
    assert [lab.plan(num_train_epochs=epochs).steps for epochs in (0.4, 2)] == [1, 6]


def max_steps(lab: Lab) -> None:
    assert len(lab.steps(max_steps=1, num_train_epochs=9)) == 1
    assert lab.plan(max_steps=8, num_train_epochs=1).steps == 8, "it wins over fewer epochs, too"


# ---------------------------------------------------------------- the optimizer


def learning_rate(lab: Lab) -> None:
    assert lab.baseline.steps[0].learning_rate == 0.01
    assert lab.steps(learning_rate=0.006)[0].learning_rate == 0.006


def optim(lab: Lab) -> None:
    files = {}
    for kind in ("adamw", "adamw_8bit"):
        lab.events(optim=kind, lora_r=128, save_steps=2)
        files[kind] = {
            name.partition(".")[0]
            for name in read_header(lab.output / "checkpoints" / "step-2" / "state.safetensors")
        }
    assert files["adamw"] == {"weight", "exp_avg", "exp_avg_sq"}
    assert files["adamw_8bit"] == {"weight", "state1", "state2", "absmax1", "absmax2"}
    with pytest.raises(ValidationError, match="optim"):
        lab.events(optim="sgd")


def weight_decay(lab: Lab) -> None:
    changes_the_adapter(lab, "weight_decay", 0.5)


def max_grad_norm(lab: Lab) -> None:
    changes_the_adapter(lab, "max_grad_norm", 1e-8)
    full = {"method": "full", "lora_r": "auto"}
    for norm in (0, 1):
        assert lab.plan(**full, max_grad_norm=norm).config.step_in_backward is (norm == 0)


# ---------------------------------------------------------------- the adapter


def lora_r(lab: Lab) -> None:
    assert len(lab.baseline.adapter) != len(lab.adapter(lora_r=4))
    assert read_json(lab.output / "adapter" / "adapter_config.json")["r"] == 4


def lora_alpha(lab: Lab) -> None:
    changes_the_adapter(lab, "lora_alpha", 4)


def lora_dropout(lab: Lab) -> None:
    changes_the_adapter(lab, "lora_dropout", 0.5)


def lora_target_modules(lab: Lab) -> None:
    lab.events(lora_target_modules=["q_proj", "layers.1.mlp.up_proj"])
    assert set(load_trained_session(lab.output).model.network.state_dict()) & {
        "model.layers.0.self_attn.q_proj.lora_A"
    }
    assert len(read_adapter_bytes(lab.last)) < len(lab.baseline.adapter)
    for modules, layers in (("mlp", 6), (r".*\.1\..*_proj", 7)):
        assert len(load(lab.adapter(lora_target_modules=modules))) == 2 * layers
    with pytest.raises(InputError, match="no linear layer is called q_prj"):
        lab.events(lora_target_modules=["q_prj"])
    assert not lab.output.exists(), "refused before the run has a folder"


def use_rslora(lab: Lab) -> None:
    changes_the_adapter(lab, "use_rslora", True)
    assert read_json(lab.output / "adapter" / "adapter_config.json")["use_rslora"] is True


def use_dora(lab: Lab) -> None:
    changes_the_adapter(lab, "use_dora", True)
    assert read_json(lab.output / "adapter" / "adapter_config.json")["use_dora"] is True
    magnitudes = [
        name
        for name in load(read_adapter_bytes(lab.last))
        if name.endswith("lora_magnitude_vector")
    ]
    assert len(magnitudes) == 14


def modules_to_save(lab: Lab) -> None:
    changes_the_adapter(lab, "modules_to_save", ["model.norm"])
    names = read_header(lab.output / "adapter" / "adapter_model.safetensors")
    assert [name for name in names if "lora" not in name] == ["base_model.model.model.norm.weight"]
    with pytest.raises(InputError, match="no module with weights has a path that ends in nor"):
        lab.events(modules_to_save="nor")


# ---------------------------------------------------------------- how it is computed and measured


def guard(lab: Lab) -> None:
    files = write_eval_files(lab.folder) | WITHOUT_ANSWERS

    def probed(**options: Any) -> set[int]:
        events = lab.events(**files, learning_rate=0.5, guard=options)
        return {event.step for event in events if getattr(event, "metric", "") == "repetition"}

    assert probed(collapse="warn", probe_steps=1) == {0, 1, 2, 3}
    assert probed(collapse="off", forgetting="off", probe_steps=1) == set()
    assert probed(collapse="warn", probe_steps=0) == set()
    ended = lab.events(
        **files, learning_rate=0.5, save_steps=9, guard={"probe_steps": 1, "forgetting": "off"}
    )
    assert "training ends there" in [e for e in ended if isinstance(e, CheckResult)][-1].evidence
    steps = lab.events(
        **files,
        eval_steps=1,
        learning_rate=1.0,
        warmup_ratio=0.3,
        guard={"collapse": "off", "patience": 1},
    )
    assert len([event for event in steps if isinstance(event, TrainStep)]) < 3


def save_steps(lab: Lab) -> None:
    def saved(every: int) -> list[int]:
        return [
            event.step
            for event in lab.events(save_steps=every)
            if isinstance(event, CheckpointSaved)
        ]

    assert (saved(1), saved(2)) == ([1, 2], [2])


def eval_steps(lab: Lab) -> None:
    files = write_eval_files(lab.folder) | WITHOUT_ANSWERS

    def looked(every: int) -> list[int]:
        events = lab.events(**files, eval_steps=every)
        return [
            event.step
            for event in events
            if isinstance(event, Score) and (event.task, event.metric) == ("eval", "loss")
        ]

    assert (looked(1), looked(2)) == ([1, 2, 3], [2, 3])


def seed(lab: Lab) -> None:
    first, other = (lab.steps(seed=number) for number in (1, 2))
    assert [step.tokens for step in first] != [step.tokens for step in other], (
        "another order of rows"
    )
    adapters = [
        lab.adapter(seed=number, batch_size=6, max_steps=1, warmup_ratio=0.5) for number in (1, 2)
    ]
    assert adapters[0] != adapters[1], "no update yet: another start of the adapter"


def output_dir(lab: Lab) -> None:
    lab.events(output_dir=str(lab.folder / "here" / "it is"))
    assert (lab.folder / "here" / "it is" / "record.json").exists()


CASES: dict[str, Callable[[Lab], None]] = {
    name: case
    for name, case in (
        *globals().items(),
        *vars(compute_keys).items(),
        *vars(evaluation_keys).items(),
        *vars(objective_keys).items(),
    )
    if inspect.isfunction(case) and list(inspect.signature(case).parameters) == ["lab"]
}
CASES["test_data"] = held_out_data  # under its name, pytest would take it for a test


@pytest.mark.parametrize("key", list(KEYS))
def test_changing_a_key_changes_what_a_run_does(key: str, lab: Lab) -> None:
    assert key in CASES, f"{key} needs a case here: a run in which it makes a difference"
    CASES[key](lab)
