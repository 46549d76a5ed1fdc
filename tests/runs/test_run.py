"""The story of a run, end to end on a tiny model folder: what it yields, what it leaves behind, and
how it goes on."""

import dataclasses
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tunesmith
from tiny_models import collate_documents
from tiny_runs import (
    END,
    TURNS,
    build_sum_rows,
    make_chat_row,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith import __version__
from tunesmith.core.atomic import verify_dir
from tunesmith.core.errors import GateError, InputError, Interrupted, MachineError
from tunesmith.core.events import (
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Score,
    TrainingEnd,
    TrainStep,
)
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.sampling import SamplingParams, check_sampling
from tunesmith.core.types import Document, RunRecord
from tunesmith.evaluate.results import EvalResults, compare_results
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.session import inputs
from tunesmith.session.identity import read_provenance
from tunesmith.session.reopen import load_trained_session
from tunesmith.train import run

TOKENS_L = np.frombuffer(b"<3 and 9> {sum}", np.uint8).astype(np.int32)
DOCUMENT = Document(
    "a:1", TOKENS_L, np.arange(len(TOKENS_L), dtype=np.float32)
)  # all but the first are targets
IDS = torch.tensor(TOKENS_L[None, :-1], dtype=torch.int64)


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything measured. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    files = write_eval_files(folder)
    train(
        make_tiny_recipe(
            tiny_folder,
            folder,
            **files,
            metrics=["json_valid", "exact_match"],
            save_steps=2,
            eval_steps=2,
        )
    )
    return folder / "run"


def our_logits(path: Path) -> torch.Tensor:
    """Of a finished run's model, through our own layers."""
    model = load_trained_session(path).model
    with torch.no_grad():
        return model.head.compute_logits(model.compute_hidden(collate_documents([DOCUMENT])))


def test_a_run_proves_measures_trains_and_measures_again(tiny_folder: Path, tmp_path: Path) -> None:
    files = write_eval_files(tmp_path)
    all_events = train(make_tiny_recipe(tiny_folder, tmp_path, **files, save_steps=2, eval_steps=2))
    # the graded answers of each look, from which a resumed run knows what was said
    samples = [event for event in all_events if isinstance(event, GenerationSample)]
    assert {sample.step for sample in samples} == {2, 3}
    events = [event for event in all_events if not isinstance(event, GenerationSample)]
    kinds = [type(event) for event in events]
    first_step, done = kinds.index(TrainStep), kinds.index(TrainingEnd)
    assert {CheckResult, Score} == set(kinds[:first_step])
    checks = [event for event in events if isinstance(event, CheckResult)]
    # four texts and three prompts are too few; the folder names another end than answers have
    unwatched = {check.kind for check in checks if check.level != "ok"}
    assert unwatched == {"forgetting", "answers unlearned", "EOS is supervised"}
    # held-out loss, answers by two metrics; expected answers; general text and its KL; the guard
    look = [*[Score] * 7, CheckResult]
    assert kinds[first_step : done + 1] == [
        TrainStep,
        TrainStep,
        *look,
        CheckpointSaved,
        TrainStep,
        *look,
        TrainingEnd,
    ]
    assert events[done] == TrainingEnd(3, "finished", events[done].seconds)
    before, after = (
        {(e.task, e.metric): e for e in part if isinstance(e, Score)}
        for part in (events[:first_step], events[done:])
    )
    assert before.keys() == {
        ("test", "field_f1"),
        ("test", "json_valid"),
        ("test", "loss"),
        ("general text", "bits_per_byte"),
    }
    moved = {
        (task, metric) for task in ("test", "general text") for metric in ("kl", "top1_agreement")
    }
    assert after.keys() == before.keys() | moved
    assert {score.step for score in before.values()} == {0}
    assert {score.step for score in after.values()} == {3}
    assert after["test", "loss"].high < before["test", "loss"].low


def test_every_file_of_the_run_folder_is_there(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()} - {".lock", ".lock.pid"}
    assert names == {
        *(
            "recipe.yaml",
            "resolved.yaml",
            "plan.json",
            "data.json",
            "events.jsonl",
            "preflight.json",
            "eval_before.json",
            "checkpoints",
            "adapter",
        ),
        *("eval_after.json", "fingerprint.json", "record.json"),
    }
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"step-0", "step-2"}
    assert verify_dir(finished / "checkpoints" / "step-2") == ""
    assert verify_dir(finished / "adapter") == ""
    assert read_json(finished / "data.json").keys() == {"data", "eval_data", "test_data"}


def test_events_are_lines_with_the_fields_that_others_rely_on(finished: Path) -> None:
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    assert all(event["attempt"] == 1 and event["time"] > 1.7e9 for event in events)
    assert Counter(event["type"] for event in events).keys() == {
        "verdict",
        "score",
        "sample",
        "step",
        "saved",
        "done",
    }
    steps = [event for event in events if event["type"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3]
    fields = {
        "step",
        "loss",
        "tokens",
        "supervised_tokens",
        "seconds",
        "learning_rate",
        "grad_norm",
        "peak_bytes",
    }
    for event in steps:
        others = {"type", "time", "attempt", "crc32", "task_tokens", "shared_tokens"}
        assert event.keys() == others | fields
        assert all(isinstance(event[name], (int, float)) for name in fields)
    report = read_json(finished / "data.json")["data"]
    assert sum(event["tokens"] for event in steps) == report["tokens"]
    assert sum(event["supervised_tokens"] for event in steps) == report["supervised_tokens"]


def test_the_record_pairs_before_and_after(finished: Path) -> None:
    record = parse_as(RunRecord, read_json(finished / "record.json"))
    assert (record.version, record.steps, record.adapter) == (
        __version__,
        3,
        str(finished / "adapter"),
    )
    assert {c.metric for c in record.comparisons} == {
        "json_valid",
        "exact_match",
        "loss",
        "bits_per_byte",
    }
    for comparison in record.comparisons:
        assert comparison.low <= comparison.difference <= comparison.high
        assert comparison.after.n == comparison.before.n
    before, after = (
        parse_as(EvalResults, read_json(finished / name))
        for name in ("eval_before.json", "eval_after.json")
    )
    assert compare_results(before, after, step=3) == record.comparisons
    assert {role: len(rows) for role, rows in after.digests.items()} == {
        "retention_data": 4,
        "test_data": 3,
    }
    assert [(a.id, b.id) for a, b in record.samples] == [
        (f"test.jsonl:{n}", f"test.jsonl:{n}") for n in (1, 2, 3)
    ]
    assert record.samples[0][0].expected == '{"sum": 40200}'


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's
def test_peft_loads_the_adapter_with_equal_logits(finished: Path, tiny_folder: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        base = stock(IDS).logits[0]
        theirs = PeftModel.from_pretrained(stock, finished / "adapter").eval()(IDS).logits[0]
    assert not torch.allclose(base, theirs, atol=1e-2), "the adapter does something"
    torch.testing.assert_close(our_logits(finished), theirs, atol=1e-4, rtol=1e-4)


def test_the_adapter_says_how_it_is_served_and_what_it_belongs_to(
    finished: Path, tiny_folder: Path
) -> None:
    adapter = finished / "adapter"
    assert AutoTokenizer.from_pretrained(adapter).chat_template == TURNS
    assert read_json(adapter / "generation_config.json")["eos_token_id"][0] == END
    manifest = read_json(adapter / "manifest.json")
    assert "model.safetensors" in json.dumps(manifest)
    config = read_json(adapter / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == (
        "LORA",
        2,
        str(tiny_folder),
    )
    provenance = read_provenance(adapter)
    assert provenance is not None
    assert provenance.weights_sha256 == read_adapter(adapter, tiny_folder).sha256


def test_evaluating_again_finds_what_the_record_says(finished: Path) -> None:
    record = parse_as(RunRecord, read_json(finished / "record.json"))
    again = tunesmith.evaluate(finished).comparisons
    for then, now in zip(record.comparisons, again, strict=True):
        assert (then.task, then.metric) == (now.task, now.metric)
        assert now.before.value == pytest.approx(then.before.value, abs=1e-6)
        assert now.after.value == pytest.approx(then.after.value, abs=1e-6)


def test_what_was_learned_by_heart_is_said_in_chat_and_scored(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [
        make_chat_row("red", '{"a": 1}', system="colours"),
        make_chat_row("blue", '{"b": 22}', system="colours"),
    ]
    test = str(write_rows(tmp_path / "test.jsonl", rows))
    for row in rows:  # rows of the test are not trained on: these render alike, and are others
        row["messages"][1]["name"] = "asker"
    data = str(write_rows(tmp_path / "data.jsonl", rows))
    wish = make_tiny_recipe(
        tiny_folder,
        tmp_path,
        data=data,
        test_data=test,
        num_train_epochs=80,
        lora_r=8,
        metrics=["field_f1"],
    )
    scores = [
        event for event in train(wish) if isinstance(event, Score) and event.metric == "field_f1"
    ]
    assert [score.value for score in scores] == [0, 1]
    assert next(tunesmith.chat(tmp_path / "run", ["red"])) == '{"a": 1}'
    assert next(tunesmith.chat(tmp_path / "run", ["blue"])) == '{"b": 22}'


def test_a_chat_is_one_conversation(finished: Path) -> None:
    chatting = tunesmith.chat(finished, ["3 and 9", "and now something else" * 30])
    next(chatting)
    with pytest.raises(InputError, match="fills the context"):
        next(chatting)


def test_a_chat_samples_as_its_options_say(finished: Path) -> None:
    """One seed gives one conversation, another seed another; greedy is the default."""

    def answers(system: str | None = None, **options: Any) -> list[str]:
        sampling = SamplingParams(max_new_tokens=12, **options)
        return list(tunesmith.chat(finished, ["3 and 9", "more"], sampling, system=system))

    greedy = answers()
    assert answers(temperature=0.0) == greedy
    assert answers(temperature=3.0, top_k=1) == greedy
    assert answers(temperature=3.0, top_p=1e-9) == greedy
    assert answers(temperature=3.0, min_p=1.0) == greedy
    first = answers(temperature=3.0, seed=1)
    assert answers(temperature=3.0, seed=1) == first != greedy
    assert answers(temperature=3.0, seed=2) != first
    assert answers(temperature=3.0, seed=1, top_k=5) != first
    assert answers(repetition_penalty=50.0) != greedy
    assert len(answers()[0]) <= 12
    assert answers(system="Answer in capitals, please.") != greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0"),
        ({"temperature": 1, "top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 1, "min_p": 2}, "min_p is 2"),
        ({"temperature": 1, "top_k": -2}, "top_k is -2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"top_p": 0.9}, "top_p has no effect at temperature 0"),
        ({"top_k": 5}, "top_k has no effect at temperature 0"),
        ({"min_p": 0.1}, "min_p has no effect at temperature 0"),
        ({"seed": 3}, "seed has no effect at temperature 0"),
    ],
)
def test_sampling_options_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_sampling(SamplingParams(**options))
    assert caught.value.fix


# ---------------------------------------------------------------- stopping and going on


def test_a_run_left_after_a_checkpoint_goes_on_to_the_same_adapter(
    tiny_folder: Path, tmp_path: Path
) -> None:
    straight = make_tiny_recipe(tiny_folder, tmp_path / "straight", save_steps=1, lora_dropout=0.2)
    broken = make_tiny_recipe(tiny_folder, tmp_path / "broken", save_steps=1, lora_dropout=0.2)
    train(straight)
    run_until_saved(run.train(plan_recipe(broken)), step=2)
    assert isinstance(broken.output_dir, Path)
    assert not (broken.output_dir / "adapter").exists()
    events = list(run.resume(broken.output_dir))
    assert [step.step for step in select_steps(events)] == [3]
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)
    assert isinstance(straight.output_dir, Path)
    provenances = [read_provenance(r.output_dir / "adapter") for r in (straight, broken)]
    assert provenances[0].weights_sha256 == provenances[1].weights_sha256 != ""
    record = parse_as(RunRecord, read_json(broken.output_dir / "record.json"))
    assert record.steps == 3


def test_a_run_stopped_before_any_checkpoint_starts_over(tiny_folder: Path, tmp_path: Path) -> None:
    straight, broken = (
        make_tiny_recipe(tiny_folder, tmp_path / name) for name in ("straight", "broken")
    )
    train(straight)
    events = run.train(plan_recipe(broken))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert isinstance(broken.output_dir, Path)
    assert [step.step for step in select_steps(list(run.resume(broken.output_dir)))] == [1, 2, 3]
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


def test_a_signal_stops_after_a_whole_step_and_saves_it(tiny_folder: Path, tmp_path: Path) -> None:
    straight, stopped = (
        make_tiny_recipe(tiny_folder, tmp_path / name, save_steps=100)
        for name in ("straight", "stopped")
    )
    train(straight)
    seen: list[Event] = []

    def follow() -> None:
        for event in run.train(plan_recipe(stopped)):
            seen.append(event)
            if isinstance(event, TrainStep):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="tunesmith resume") as stop:
        follow()
    assert stop.value.exit_code == 143
    assert [type(event) for event in seen[-2:]] == [TrainStep, CheckpointSaved]
    assert isinstance(stopped.output_dir, Path)
    assert [step.step for step in select_steps(list(run.resume(stopped.output_dir)))] == [2, 3]
    assert read_adapter_bytes(stopped) == read_adapter_bytes(straight)


def test_a_finished_run_is_not_resumed(finished: Path) -> None:
    with pytest.raises(InputError, match="finished"):
        next(run.resume(finished))


def test_looking_at_held_out_rows_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    files = write_eval_files(tmp_path)
    often, never = (
        make_tiny_recipe(tiny_folder, tmp_path / name, **more, eval_steps=1, lora_dropout=0.1)
        for name, more in (("often", files), ("never", {}))
    )
    scores = [event for event in train(often) if isinstance(event, Score) and event.task == "eval"]
    train(never)
    assert [score.step for score in scores if score.metric == "loss"] == [1, 2, 3]
    assert read_adapter_bytes(often) == read_adapter_bytes(never)


# ---------------------------------------------------------------- full fine-tuning


def test_full_fine_tuning_saves_a_model_that_transformers_loads(
    tiny_folder: Path, tmp_path: Path
) -> None:
    files = write_eval_files(tmp_path)
    wish = make_tiny_recipe(
        tiny_folder, tmp_path, **files, method="full", lora_r="auto", learning_rate=1e-3
    )
    (measured,) = [
        e
        for e in train(wish)
        if isinstance(e, Score) and (e.task, e.metric, e.step) == ("test", "loss", 3)
    ]
    target = tmp_path / "run" / "model"
    assert verify_dir(target) == ""
    stock = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    tuned = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assert not [
        name for name, p in stock.named_parameters() if torch.equal(p, tuned.get_parameter(name))
    ]
    assert AutoTokenizer.from_pretrained(target).chat_template == TURNS
    rows = inputs.load_inputs(wish).datasets["test_data"]
    documents = [document for row in range(len(rows)) for document in rows.render_documents(row)]
    assert float(
        np.concatenate([stock_losses(tuned, d) for d in documents]).mean()
    ) == pytest.approx(measured.value)


@torch.no_grad()
def stock_losses(network: PreTrainedModel, document: Document) -> np.ndarray:
    """Of the trained tokens, by plain transformers."""
    tokens_L = torch.from_numpy(document.tokens_L).long()
    losses = torch.nn.functional.cross_entropy(
        network(tokens_L[None, :-1]).logits[0], tokens_L[1:], reduction="none"
    )
    return losses.numpy()[document.weights_L[1:] > 0]


# ---------------------------------------------------------------- refused before anything is loaded


def test_a_folder_with_content_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    plan = plan_recipe(make_tiny_recipe(tiny_folder, tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty: thesis\.txt"):
        next(run.train(plan))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_machine_without_memory_is_said_before_starting(
    tiny_folder: Path, tmp_path: Path
) -> None:
    plan = plan_recipe(make_tiny_recipe(tiny_folder, tmp_path))
    small = dataclasses.replace(
        plan, machine=dataclasses.replace(plan.machine, available_bytes=10**8)
    )
    with pytest.raises(MachineError, match=r"0\.1 GB are free"):
        next(run.train(small))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metrics": ["exact_mach"]}, "unknown metric 'exact_mach'"),
        ({"metrics": ["schema_valid"]}, "schema_valid needs a schema"),
        ({"retention_data": "none.jsonl"}, r"none\.jsonl"),
        ({"retention_data": "lonely.jsonl"}, "1 text of domain 'b'"),
        ({"retention_data": "short.jsonl"}, "0 texts of domain 'general'"),
        ({"test_data": "asks-once.jsonl"}, "1 prompt: an interval needs at least two"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_no_folder(
    changed: dict[str, object], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    texts = [{"text": "long enough", "domain": domain} for domain in "aab"]
    write_rows(tmp_path / "lonely.jsonl", texts)
    write_rows(tmp_path / "short.jsonl", [{"text": "a"}, {"text": "b"}])
    write_rows(tmp_path / "asks-once.jsonl", build_sum_rows(50, 1))
    changed = {key: str(tmp_path / v) if key.endswith("data") else v for key, v in changed.items()}
    if "asks-once" in str(changed):
        rows = [
            {"path": changed["test_data"]},
            {"path": str(write_rows(tmp_path / "t.jsonl", [{"text": "some"}]))},
        ]
        changed["test_data"] = rows
    plan = plan_recipe(
        make_tiny_recipe(tiny_folder, tmp_path, **(write_eval_files(tmp_path) | changed))
    )
    with pytest.raises(InputError, match=message):
        next(run.train(plan))
    assert not (tmp_path / "run").exists()


def test_a_run_that_trains_nothing_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    row = make_chat_row("3 and 9", "12")
    row["messages"][1]["train"] = False
    rows = write_rows(tmp_path / "nothing.jsonl", [row, row])
    with pytest.raises(InputError, match="trains"):
        list(run.train(plan_recipe(make_tiny_recipe(tiny_folder, tmp_path, data=str(rows)))))


def test_answers_that_are_all_cut_before_their_end_are_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [make_chat_row("tell me", "a long answer " * n) for n in (5, 6)]
    for more in ([], [make_chat_row("tell me", "no")]):
        data = str(write_rows(tmp_path / f"{len(more)}.jsonl", rows + more))
        wish = make_tiny_recipe(
            tiny_folder, tmp_path / str(len(more)), data=data, max_length=60, on_overlong="truncate"
        )
        if more:
            assert select_steps(train(wish)), "one whole answer shows where answers end"
        else:
            with pytest.raises(GateError, match="would never learn to stop"):
                train(wish)


def test_reopening_needs_a_finished_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    wish = make_tiny_recipe(tiny_folder, tmp_path, save_steps=1)
    run_until_saved(run.train(plan_recipe(wish)), step=1)
    with pytest.raises(InputError, match="no adapter yet"):
        load_trained_session(tmp_path / "run")
    with pytest.raises(InputError, match="no such run folder"):
        tunesmith.evaluate(tmp_path / "nowhere")
