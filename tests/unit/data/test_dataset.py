import json

import numpy as np
import pytest

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example
from tunesmith.data.dataset import open_dataset
from tunesmith.data.hashing import compute_shape, hash_example
from tunesmith.data.truncation import apply_max_length
from tunesmith.recipe.fields import DataSource


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def document(*weights):
    return Document("r", np.arange(len(weights), dtype=np.int32), np.array(weights, np.float32))


def formats(dataset):
    return [part.format for part in dataset.parts]


def test_rows_are_counted_and_rendered_on_demand(write, words):
    path = write(lines(pair("a b", "c"), pair("d", "e f g")))
    dataset = open_dataset([DataSource(path=path)], words)
    assert (len(dataset), formats(dataset), dataset.path) == (2, ["completion"], str(path))
    assert "user turn" in dataset.parts[0].format_reason
    (only,) = dataset.render_documents(1)
    assert only.id == "train.jsonl:2"
    assert words.decode(only.tokens_L.tolist()) == "<s>userd</s><s>assistante f g</s>"
    assert only.weights_L.tolist() == [0] * 6 + [1] * 4


def test_files_of_other_formats_stand_behind_each_other(write, words):
    first, second = (
        write(lines(pair("a", "b")), "a.jsonl"),
        write(lines({"text": "x"}, {"text": "y"}), "b.jsonl"),
    )
    dataset = open_dataset([DataSource(path=first), DataSource(path=second)], words)
    assert [dataset.get_id(i) for i in range(3)] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]
    assert dataset.read_example(2).text == "y"
    assert formats(dataset) == ["completion", "text"]
    single = open_dataset([DataSource(path=first)], words)
    assert single.fingerprint == single.parts[0].source.fingerprint != dataset.fingerprint


def test_files_of_the_same_name_keep_different_ids(tmp_path, words):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(lines({"text": folder}))
    dataset = open_dataset([DataSource(path=tmp_path / f / "x.jsonl") for f in "ab"], words)
    assert dataset.get_id(0).endswith("a/x.jsonl:1")
    assert dataset.get_id(1).endswith("b/x.jsonl:1")


@pytest.mark.parametrize(
    ("file_limit", "total_limit", "rows"),
    [(2, None, [1, 2, 1, 2, 3]), (2, 4, [1, 2, 1, 2]), (None, 2, [1, 2])],
)
def test_max_examples_takes_the_first_rows_of_a_file_and_of_all(
    write, words, file_limit, total_limit, rows
):
    paths = [
        write(lines(*({"text": f"{name}{i}"} for i in range(3))), f"{name}.jsonl") for name in "ab"
    ]
    files = [DataSource(path=paths[0], max_examples=file_limit), DataSource(path=paths[1])]
    dataset = open_dataset(files, words, max_examples=total_limit)
    assert [int(dataset.get_id(i).split(":")[1]) for i in range(len(dataset))] == rows
    assert dataset.read_example(len(rows) - 1).id == dataset.get_id(len(rows) - 1)


def test_a_given_format_wins(write, words):
    path = write(lines({"text": "a", "messages": []}))
    dataset = open_dataset([DataSource(path=path, format="text")], words)
    assert (dataset.read_example(0).text, dataset.parts[0].format_reason) == (
        "a",
        "set in the recipe",
    )


def test_unusable_rows_are_left_out_counted_and_remembered(write, words):
    good = json.dumps(pair("a", "b"))
    path = write("\n".join([good, "{", json.dumps(pair("a", "")), *["[]"] * 7, good]))
    dataset = open_dataset([DataSource(path=path)], words)
    assert [dataset.get_id(i) for i in range(len(dataset))] == ["train.jsonl:1", "train.jsonl:11"]
    assert dataset.read_example(1).id == "train.jsonl:11"
    assert dict(dataset.rejected_rows.counts) == {
        "not an object": 7,
        "not JSON": 1,
        "empty answer": 1,
    }
    assert list(dataset.rejected_rows.iter_indices()) == [(0, row) for row in range(1, 10)]
    assert [problem.where for problem in dataset.rejected_rows.examples["not an object"]] == [
        f"train.jsonl:{n}" for n in range(4, 9)
    ]


def test_without_a_usable_row_the_first_reasons_are_said(write, words):
    path = write("\n".join(["{", *[json.dumps(pair("a", ""))] * 8]))
    with pytest.raises(InputError) as caught:
        open_dataset([DataSource(path=path)], words)
    assert caught.value.where == str(path)
    assert caught.value.message.startswith(
        "none of the 9 rows can be used: 8 empty answer, 1 not JSON\n  train.jsonl:1:2: not JSON"
    )
    assert caught.value.message.endswith("\n  train.jsonl:5: the completion is empty\n  and 4 more")
    with pytest.raises(InputError, match="none of the 1 rows can be used: 1 not JSON"):
        open_dataset([DataSource(path=write("{"))], words)


def test_the_format_is_seen_behind_rows_that_cannot_be_read(write, words):
    path = write("{\n" * 30 + json.dumps({"text": "a"}))
    assert formats(open_dataset([DataSource(path=path)], words)) == ["text"]


def test_a_source_can_weigh_more(write, words):
    path = write(lines({"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0.5},
        {"role": "assistant", "content": "c d"},
    ]}))  # fmt: skip
    plain, heavy = (
        open_dataset([DataSource(path=path, weight=w)], words).render_documents(0)[0]
        for w in (1, 3)
    )
    assert plain.weights_L.tolist() == [0] * 6 + [0.5, 0.5, 0, 0, 1, 1, 1]
    assert heavy.weights_L.tolist() == [3 * weight for weight in plain.weights_L.tolist()]
    assert heavy.tokens_L.tolist() == plain.tokens_L.tolist()


@pytest.mark.parametrize(
    ("policy", "lengths", "dropped", "truncated"),
    [("drop", [3], "", 0), ("truncate", [3, 4], "", 1)],
)
def test_long_documents_are_dropped_or_cut_and_counted(policy, lengths, dropped, truncated):
    prepared = apply_max_length("r", [document(0, 0, 1), document(0, 1, 0, 1, 1)], 4, policy)
    assert [len(each) for each in prepared.documents] == lengths
    assert (prepared.drop_reason, prepared.num_overlong, prepared.num_truncated) == (
        dropped,
        1,
        truncated,
    )
    assert not prepared.is_answer_too_long


@pytest.mark.parametrize(
    ("documents", "policy", "dropped"),
    [
        ([document(0, 0, 0, 0, 1)], "drop", "longer than max_length"),
        ([document(0, 0, 0, 0, 1)], "truncate", "no supervised token after truncation"),
        ([document(0, 0)], "drop", "no supervised token"),
        ([], "drop", "no supervised token"),
    ],
)
def test_a_row_without_a_target_keeps_its_slot_with_a_reason(documents, policy, dropped):
    prepared = apply_max_length("r", documents, 4, policy)
    assert (prepared.documents, prepared.drop_reason, prepared.num_truncated) == ((), dropped, 0)


def test_long_documents_can_be_refused_and_lengths_up_to_the_limit_are_fine():
    with pytest.raises(InputError, match="r: the row has 5 tokens, but max_length is 4"):
        apply_max_length("r", [document(0, 0, 0, 0, 1)], 4, "refuse")
    assert len(apply_max_length("r", [document(0, 0, 0, 0, 1)], 5, "refuse").documents) == 1
    assert len(apply_max_length("r", [document(0, 0, 0, 0, 1)], None, "refuse").documents) == 1


def test_an_answer_that_alone_is_too_long_is_marked():
    assert apply_max_length("r", [document(0, 1, 1, 1, 1, 1)], 4, "drop").is_answer_too_long


def test_limits_and_choices_make_new_data_sets(write, words):
    dataset = open_dataset(
        [DataSource(path=write(lines({"text": "a"}, {"text": "a b c d"})))], words
    )
    assert (
        dataset.with_max_length(4, "drop").render_row(1)[1].drop_reason == "longer than max_length"
    )
    assert dataset.render_row(1)[1].drop_reason == ""
    assert dataset.select_rows(np.array([1])).read_example(0).text == "a b c d"


def test_digests_even_out_white_space_and_separate_prompt_from_answer():
    def chat(*contents, **more):
        roles = ("user", "assistant")
        turns = tuple(
            {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
        )
        return hash_example(Example("r", messages=turns, turn_weights=(0, 1), **more))

    assert chat("a  b", "c\n") == chat("a b", " c")
    assert chat("a", "b")[0] != chat("a", "c")[0]
    assert chat("a", "b")[1] == chat("a", "c")[1] != chat("x", "b")[1]
    assert chat("a", "b", "a", "c")[1] == chat("a", "b", "a", "d")[1] != chat("a", "c")[1]
    assert chat("a b", "c") != chat("a", "b c")
    assert chat("a", "b", tools=({"name": "f"},))[0] != chat("a", "b")[0]
    assert (
        hash_example(Example("r", text="b", prompt="a"))[1]
        == hash_example(Example("r", text="c", prompt="a"))[1]
    )
    assert len({*hash_example(Example("r", text="a"))}) == 1


def test_shapes_are_what_templates_look_at():
    def of(*turns, **more):
        messages = [{"role": role, "content": content} for role, content in turns]
        weights = tuple(float(role == "assistant") for role, _ in turns)
        return compute_shape(Example("r", messages=tuple(messages), turn_weights=weights, **more))

    once = [("user", "a"), ("assistant", "b")]
    assert of(*once * 2) == of(*once * 5) == of(*[("user", "x"), ("assistant", "y")] * 3)
    others = [
        once,
        once * 2,
        [("system", "s"), *once],
        [*once, *once[1:]],
        [("user", " "), once[1]],
        [once[1]],
    ]
    assert len({of(*turns) for turns in others} | {of(*once, tools=({"name": "f"},))}) == 7
