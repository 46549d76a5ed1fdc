"""Metrics on answers as models give them, questions as they are served, and a task from rows to
measurements."""

import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Example
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.generate_until import (
    EvalPrompt,
    apply_metrics,
    build_prompts,
    build_samples,
    check_prompts,
    compute_max_new_tokens,
    iter_answers,
)
from tunesmith.evaluate.json_metrics import field_f1, json_valid, schema_valid
from tunesmith.evaluate.metrics import METRICS
from tunesmith.model.causal_lm import PackedCausalLM

SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "additionalProperties": False,
}
GOLD = '{"name": "Ada", "age": 36}'
ALL = (
    *(name for name in METRICS if name != "regex"),
    "regex: Ada",
    "contains: ADA",
    "numeric: 0.1",
)


def chat(*contents: str, weights: tuple[float, ...] = (), row: str = "test:1") -> Example:
    messages = tuple(
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    )
    return Example(row, messages, weights or tuple(float(i % 2) for i in range(len(contents))))


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        (GOLD, True),
        (f"  {GOLD}\n", True),
        ("null", True),
        ("[1, 2]", True),
        ("", False),
        (f"Here it is: {GOLD}", False),
        (f"```json\n{GOLD}\n```", False),
        (GOLD + GOLD, False),
        (GOLD[:-1], False),
        ("{'name': 'Ada'}", False),
        ('{"age": NaN}', False),
        ('{"age": -Infinity}', False),
        ("[" * 100_000, False),
        ("9" * 5000, False),
    ],
)
def test_json_valid_wants_the_whole_answer(answer: str, valid: bool) -> None:
    assert json_valid(answer, GOLD, None) == float(valid)


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        (GOLD, True),
        ('{"name": "x"}', True),
        ('{"age": 3}', False),
        ('{"name": "x", "age": "3"}', False),
        ('{"name": "x", "more": 1}', False),
        ("not JSON", False),
    ],
)
def test_schema_valid_follows_the_schema(answer: str, valid: bool) -> None:
    assert schema_valid(answer, GOLD, SCHEMA) == float(valid)


def test_a_schema_that_points_elsewhere_is_refused_and_nothing_is_fetched() -> None:
    with pytest.raises(InputError, match=r"refers to 'http://127\.0\.0\.1:9/s\.json'"):
        schema_valid(GOLD, GOLD, {"$ref": "http://127.0.0.1:9/s.json"})


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        (GOLD, GOLD, 1.0),
        ('{"age": 36.0, "name": "Ada"}', GOLD, 1.0),  # key order and 36.0 for 36 are the same JSON
        ('{"name": "Ada"}', GOLD, 2 / 3),
        ('{"name": "Ada", "age": 35}', GOLD, 0.5),
        ('{"name": "Ada", "age": 36, "x": 1}', GOLD, 0.8),
        ('{"name": "Bob", "age": 1}', GOLD, 0.0),
        ("{}", GOLD, 0.0),
        ("Ada, 36", GOLD, 0.0),
        ('{"a": {"b": [1, 2]}, "c": null}', '{"a": {"b": [1, 3]}, "c": null}', 2 / 3),
        ('{"a": [2, 1, "x", null]}', '{"a": [1, null, 2, "x"]}', 1.0),  # of plain values, no order
        ("[3, 1, 2]", "[1, 2, 3]", 1.0),
        ('{"a": [1, 1, 2]}', '{"a": [1, 2, 2]}', 2 / 3),  # but how often they occur
        ('{"a": [1, 1, 1, 1]}', '{"a": [1]}', 2 / 5),
        ('{"a": [true]}', '{"a": [1]}', 0.0),
        ('{"a": [{"b": 2}, {"b": 1}]}', '{"a": [{"b": 1}, {"b": 2}]}', 0.0),  # objects have places
        ('{"a": [[2, 1], [3]]}', '{"a": [[1, 2], [3]]}', 1.0),
        ('{"a": [[3], [1, 2]]}', '{"a": [[1, 2], [3]]}', 0.0),
        ('{"a": [1, []]}', '{"a": [[], 1]}', 0.0),
        ('{"a": []}', '{"a": {}}', 0.0),
        ('{"a": []}', '{"a": []}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": null}', '{"a": "None"}', 0.0),
        ('{"0": 1}', "[1]", 0.0),
    ],
)
def test_field_f1_counts_pairs_of_path_and_value(answer: str, expected: str, f1: float) -> None:
    assert field_f1(answer, expected, None) == pytest.approx(f1)


def _question(expected: str = GOLD) -> EvalPrompt:
    return EvalPrompt("test:1", (1, 2), "who?", expected, len(expected))


def test_an_answer_nested_without_end_is_wrong_and_breaks_nothing() -> None:
    for depth in (200, 900, 100_000):
        deep = "[" * depth + "]" * depth
        for measured in apply_metrics([_question()], [deep], task="t", metrics=ALL, schema=SCHEMA):
            assert measured.metric == "json_valid" or measured.values[0] < 0.1


# ---------------------------------------------------------------- questions


def test_a_question_is_the_prompt_as_it_is_served(renderer: Renderer) -> None:
    example = chat("hi", "hello", "who?", GOLD)
    (question,) = build_prompts([example], renderer)
    assert question.prompt_ids == renderer.encode_prompt(example.messages[:3])
    assert (question.id, question.prompt_text, question.expected) == ("test:1", "who?", GOLD)
    assert question.context == "user: hi\n\nassistant: hello"
    assert build_samples([question], ["x"], step=3)[0].context == question.context
    assert question.num_expected_tokens == len(GOLD) + 1
    limit = compute_max_new_tokens([question], needs_end=False)
    assert 1.4 * len(GOLD) < limit < compute_max_new_tokens([question], needs_end=True)


def test_the_last_trained_turn_is_asked(renderer: Renderer) -> None:
    example = chat("hi", "hello", "bye", "farewell", weights=(0, 1, 0, 0))
    (question,) = build_prompts([example], renderer)
    assert (question.prompt_text, question.expected) == ("hi", "hello")
    assert question.prompt_ids == renderer.encode_prompt(example.messages[:1])


def test_a_completion_row_is_asked_by_its_prompt(renderer: Renderer) -> None:
    (question,) = build_prompts([Example("test:3", text=" world", prompt="hello")], renderer)
    assert (question.prompt_text, question.expected) == ("hello", " world")
    assert renderer.decode(question.prompt_ids) == "hello"


@pytest.mark.parametrize(
    "example", [Example("test:4", text="no prompt"), chat("a", "b", weights=(0, 0), row="test:4")]
)
def test_a_row_that_asks_nothing_is_refused(renderer: Renderer, example: Example) -> None:
    with pytest.raises(InputError, match=r"test:4: the row has no prompt"):
        build_prompts([example], renderer)


@pytest.mark.parametrize(
    ("metrics", "schema", "expected", "message"),
    [
        (("rouge",), None, GOLD, r"unknown metric 'rouge'[\s\S]*did you mean rouge_l"),
        (("perplexity",), None, GOLD, r"unknown metric 'perplexity'[\s\S]*use exact_match, "),
        (("chrf: 6",), None, GOLD, "chrf takes no argument, got 6"),
        (("regex",), None, GOLD, r"regex needs a pattern[\s\S]*write \{regex: PATTERN\}"),
        (("regex: (",), None, GOLD, "metrics: regex: not a regular expression"),
        (("numeric: ten",), None, GOLD, "from 0 to 1, not ten"),
        (("numeric",), None, "none", "test:1: the expected answer itself fails numeric"),
        (("contains: Dear",), None, GOLD, "itself fails contains: Dear"),
        (("schema_valid",), None, GOLD, "needs a schema"),
        (("schema_valid",), {"type": "thing"}, GOLD, "not a JSON schema"),
        (
            ("exact_match", "field_f1"),
            None,
            "plain words",
            "test:1: the expected answer itself fails field_f1",
        ),
        (("schema_valid",), SCHEMA, '{"age": 3}', "itself fails schema_valid"),
    ],
)
def test_metrics_that_cannot_be_used_are_refused_first(
    metrics, schema, expected: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_prompts([_question(expected)], metrics, schema)


@pytest.mark.parametrize("name", ALL)
def test_metrics_that_fit_pass_and_find_the_expected_answer_right(name: str) -> None:
    question = _question()
    check_prompts([question], (name,), SCHEMA)
    (result,) = apply_metrics(
        [question], [question.expected], task="test", metrics=(name,), schema=SCHEMA
    )
    assert result.values == (1.0,)


# ---------------------------------------------------------------- a whole task


def test_a_task_from_rows_to_measurements(model: PackedCausalLM, renderer: Renderer) -> None:
    examples = [chat(f"number {i}?", f'{{"n": {i}}}', row=f"test:{i}") for i in range(6)]
    questions = build_prompts(examples, renderer)
    result = dict(iter_answers(model, questions, renderer, max_new_tokens=8))
    assert sorted(result) == list(range(6))
    answers = [result[i].text for i in range(6)]
    answers[2] = '{"n": 2}'  # the random network gives none that is right
    by_metric = {
        m.metric: m
        for m in apply_metrics(
            questions, answers, task="count", metrics=("exact_match", "field_f1"), schema=None
        )
    }
    assert by_metric["exact_match"].values == by_metric["field_f1"].values == (0, 0, 1, 0, 0, 0)
    assert by_metric["field_f1"].ids == tuple(f"test:{i}" for i in range(6))
    sample = build_samples(questions, answers, step=4)[2]
    assert (sample.step, sample.id, sample.prompt, sample.expected) == (
        4,
        "test:2",
        "number 2?",
        '{"n": 2}',
    )


def test_contains_goes_by_whole_words() -> None:
    contains = METRICS["contains"]
    assert contains("It is version 3.8.1-2, I think.", "3.8.1-2", None) == 1
    assert contains("The  Grey\nHeron!", "grey heron", None) == 1
    assert contains("insight", "in", None) == 0
    assert contains("3.8.12", "3.8.1", None) == 0
    assert contains("", "a", None) == 0
