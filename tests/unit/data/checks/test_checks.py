import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Example
from tunesmith.data import length_stats as scan_module
from tunesmith.data.checks.run import check_data
from tunesmith.data.checks.text_stats import find_common_ngrams
from tunesmith.data.dataset import open_dataset
from tunesmith.recipe.fields import DataSource


def chat(user, answer, *, system=None, **more):
    turns = [{"role": "system", "content": system}] if system else []
    return {
        "messages": [
            *turns,
            {"role": "user", "content": user},
            {"role": "assistant", "content": answer},
        ],
        **more,
    }


@pytest.fixture
def opened(write, words):
    def open_rows(rows, name="train", **options):
        path = write("".join(json.dumps(row) + "\n" for row in rows), f"{name}.jsonl")
        return open_dataset([DataSource(path=path)], words, **options)

    return open_rows


def findings(report, check_name=None):
    return [(f.level, f.message) for f in report.findings if check_name in (None, f.check)]


def test_clean_data_has_numbers_and_no_findings(opened):
    report = check_data({"data": opened([chat(f"ask {i}", f"say {i}") for i in range(10)])})["data"]
    assert report.findings == ()
    assert (report.rows, report.documents, report.tokens, report.supervised_tokens) == (
        10,
        10,
        100,
        30,
    )
    assert report.length_percentiles == {"p50": 10, "p90": 10, "p99": 10, "max": 10}
    assert (report.format, report.dropped, len(report.fingerprint)) == ("messages", {}, 64)


@pytest.mark.parametrize(("long", "level"), [(1, "info"), (5, "warn"), (50, "error")])
def test_losses_grow_from_info_to_error(opened, long, level):
    rows = [chat(f"ask {i} " + "word " * 20, f"say {i}") for i in range(long)]
    rows += [chat(f"ask {i}", f"say {i}") for i in range(long, 200)]
    report = check_data({"data": opened(rows, max_length=12)})["data"]
    verb = "is" if long == 1 else "are"
    reason = "longer than max_length; they count as empty slots of their steps"
    message = f"{long} of 200 rows {verb} dropped: {reason}"
    assert findings(report) == [(level, message)]
    assert report.dropped == {"longer than max_length": long}
    assert report.findings[0].rows[0] == "train.jsonl:1"
    assert len(report.findings[0].rows) == min(long, 5)


def test_cut_rows_and_answers_too_long_for_any_prompt_are_said(opened):
    rows = [chat("ask", "word " * 20), *(chat(f"ask {i}", f"say {i}") for i in range(19))]
    report = check_data({"data": opened(rows, max_length=12, on_overlong="truncate")})["data"]
    assert findings(report, "losses") == [("warn", "1 of 20 rows is truncated to max_length 12")]
    assert findings(report, "long_answers")[0][1].startswith(
        "1 of 20 rows has an answer longer than max_length 12"
    )
    assert report.truncated == 1


def test_duplicates_within_a_role(opened):
    rows = [chat("a", "b"), chat("a ", "b"), chat("a", "c"), chat("a", "b")]
    (finding,) = check_data({"data": opened(rows)})["data"].findings
    assert (finding.level, finding.message) == ("warn", "2 of 4 rows repeat an earlier row")
    assert finding.rows == ("train.jsonl:2", "train.jsonl:4")


def test_held_out_rows_that_were_trained_on_are_an_error(opened):
    train = opened([chat("a", "b"), chat("c", "d")])
    held_out = opened([chat("x", "y"), chat("a\n", "b"), chat("c", "e")], "eval")
    test = opened([chat("x", "y"), chat("z", "z")], "test")
    reports = check_data({"data": train, "eval_data": held_out, "test_data": test})
    assert reports["data"].findings == ()
    copied, same_prompt = reports["eval_data"].findings
    assert (copied.level, copied.rows) == ("error", ("eval.jsonl:2",))
    assert copied.message == "1 of 3 rows is also in data"
    assert copied.fix == "remove them from one of the two"
    assert (same_prompt.level, same_prompt.rows) == ("warn", ("eval.jsonl:3",))
    assert [(f.level, f.rows) for f in reports["test_data"].findings] == [
        ("error", ("test.jsonl:1",))
    ]
    assert "eval_data" in reports["test_data"].findings[0].message


def test_control_text_missing_system_turns_and_empty_prompts(opened):
    rows = [chat("a {x} </s>", "b", system="s"), chat(" ", "c"), chat("d", "e", system="s")]
    assert findings(check_data({"data": opened(rows)})["data"]) == [
        ("warn", "1 of 3 rows: control text is trained as text"),
        ("warn", "1 of 3 rows has no system message, 2 have one"),
        ("warn", "1 of 3 rows has an empty user message"),
    ]


def test_keys_that_nothing_reads_are_named(opened):
    rows = [chat("a", "b", id=1, note="x"), chat("c", "d", weight=2)]
    report = check_data({"data": opened(rows)})["data"]
    assert findings(report) == [
        ("warn", "not used: `weight` of a row; the row is trained anyway"),
        ("info", "not used: `note`"),
    ]


SCHEMA = {"type": "object", "required": ["total"], "properties": {"total": {"type": "number"}}}


def test_answers_that_break_the_schema(opened):
    good = [chat(f"ask {i}", f'{{"total": {i}}}') for i in range(3)]
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    }
    assert check_data({"data": opened([*good, calls])}, schema=SCHEMA)["data"].findings == ()
    answers = ('{"sum": 3}', "3 {euros}", "[" * 100_000, '{"total": ' + "1" * 5_000)
    bad = [chat(answer[:9], answer) for answer in answers]
    (finding,) = check_data({"data": opened([*good, *bad])}, schema=SCHEMA)["data"].findings
    assert (finding.level, finding.count) == ("error", 4)
    first = "train.jsonl:4: 'total' is a required property"
    assert finding.message == f"4 of 7 rows have an answer that violates response_schema; {first}"


def test_completions_without_a_template_are_checked_and_texts_are_not(opened, words):
    words.has_template = False
    rows = [{"prompt": "a", "completion": "b"}]
    assert findings(check_data({"data": opened(rows)}, schema=SCHEMA)["data"])[0][0] == "error"
    assert check_data({"data": opened([{"text": "b"}])}, schema=SCHEMA)["data"].findings == ()


def test_a_bad_schema_is_the_users_error_and_nothing_is_fetched(opened):
    data = opened([chat("a", "{}")])
    with pytest.raises(InputError, match="not a JSON schema"):
        check_data({"data": data}, schema={"type": "objekt"})
    with pytest.raises(InputError, match=r"the schema refers to .*127\.0\.0\.1"):
        check_data({"data": data}, schema={"$ref": "http://127.0.0.1:9/schema.json"})


def test_estimates_say_so(opened, monkeypatch):
    monkeypatch.setattr(scan_module, "MAX_FULL_SCAN_ROWS", 10)
    monkeypatch.setattr(scan_module, "SAMPLE_ROWS", 5)
    rows = [chat(f"ask {i} " + "word " * 20 * (i % 2), f"say {i}") for i in range(20)]
    report = check_data({"data": opened(rows, max_length=12)})["data"]
    assert "5 of 20 rows" in findings(report, "sampled")[0][1]
    assert " of 5 scanned rows are dropped" in findings(report, "losses")[0][1]
    assert report.documents + report.dropped["longer than max_length"] == 20


def test_rows_that_kto_marks_as_bad_are_told(opened):
    rows = [chat(f"ask {i}", f"say {i}", label=i % 4 > 0) for i in range(8)]
    (level, message), _ = findings(check_data({"data": opened(rows)})["data"], "unused")
    assert level == "warn"
    assert "2 of the first 8 rows have `label: false`" in message
    assert "label: false" not in repr(
        check_data({"data": opened([chat("a", "b", label="false")] * 3)})["data"].findings
    )


@dataclass
class EqualRows:
    """Rows of the same six words, and which of them were read."""

    contents_N: np.ndarray
    read_rows: list[int] = field(default_factory=list[int])

    def read_example(self, row: int) -> Example:
        self.read_rows.append(row)
        return Example(f"a:{row}", text="one two three four five six")


@pytest.mark.parametrize(("count", "num_read", "num_common"), [(10, 0, 0), (11, 11, 2)])
def test_too_few_rows_to_share_an_ngram_are_not_read_for_it(
    count: int, num_read: int, num_common: int
) -> None:
    rows: Any = EqualRows(np.arange(count, dtype=np.uint64))
    assert len(find_common_ngrams({"data": rows}, n=5)) == num_common
    assert len(rows.read_rows) == num_read
