import json
import random

import pytest

from tunesmith.core.atomic import verify_dir
from tunesmith.core.errors import InputError
from tunesmith.data.dataset import open_dataset
from tunesmith.data.split import is_in_split, split_by_group, split_by_hash
from tunesmith.recipe.fields import DataSource
from tunesmith.session.row_groups import map_groups

WORDS = [f"{a}{b}{c}" for a in "bdfglmn" for b in "aeiou" for c in "krstv"]


def prose(seed, count=30):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def chat(user, answer, **more):
    return {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
        **more,
    }


@pytest.fixture
def divided(write, words, tmp_path):
    """Rows -> (what is said of the division, the rows of each file by side)."""

    def of(rows, name="rows.jsonl", **options):
        content = "".join(json.dumps(row) + "\n" for row in rows)
        dataset = open_dataset([DataSource(path=write(content, name))], words)
        to = tmp_path / f"parts-{len(list(tmp_path.iterdir()))}"
        made = split_by_group(dataset, to, **{"eval_share": 0.2, "test_share": 0.1, **options})
        files = {file.stem: file.read_bytes().splitlines() for file in to.glob("*.jsonl")}
        assert verify_dir(to) == ""
        return made, {side: [json.loads(line) for line in lines] for side, lines in files.items()}

    return of


def test_every_row_is_in_one_file_in_its_order(divided):
    rows = [chat(prose(i), prose(i + 500)) for i in range(100)]
    made, files = divided(rows)
    assert (
        made.rows
        == {"train": 70, "eval": 20, "test": 10}
        == {side: len(of) for side, of in files.items()}
    )
    assert made.groups == made.rows
    places = {side: [rows.index(row) for row in of] for side, of in files.items()}
    assert sorted(index for of in places.values() for index in of) == list(range(100))
    assert all(of == sorted(of) for of in places.values())


def test_sides_depend_on_the_seed_and_not_on_the_order(divided):
    rows = [chat(prose(i), prose(i + 500)) for i in range(60)]
    first, other, again = (divided(rows, seed=seed)[1] for seed in (0, 1, 0))
    shuffled = divided(rows[::-1])[1]
    assert first == again != other
    assert {side: of[::-1] for side, of in shuffled.items()} == first


def test_rows_that_are_alike_stay_together(divided):
    rows = []
    for i in range(40):
        rows += [
            chat(prose(i), prose(i + 500)),
            chat(prose(i) + " so", prose(i + 500)),
        ]  # nearly the same
        rows += [
            chat(f"ask {i}", prose(i + 900)),
            chat(f"ask {i}", prose(i + 1300)),
        ]  # one question, two answers
    made, files = divided(rows, seed=3)
    assert sum(made.groups.values()) == 80
    sides = {json.dumps(row): side for side, of in files.items() for row in of}
    for first in range(0, len(rows), 2):
        assert sides[json.dumps(rows[first])] == sides[json.dumps(rows[first + 1])]
    assert made.rows["eval"] == 32


def test_rows_of_one_source_stay_together(divided):
    rows = [chat(prose(i), prose(i + 500), page=i // 5) for i in range(100)]
    made, files = divided(rows, group="page")
    pages = {side: {row["page"] for row in of} for side, of in files.items()}
    assert (
        not pages["train"] & pages["eval"]
        | pages["train"] & pages["test"]
        | pages["eval"] & pages["test"]
    )
    assert made.groups == {"train": 14, "eval": 4, "test": 2}


def test_each_label_is_divided_by_itself(divided):
    rows = [chat(prose(i), "rare" if i % 10 == 0 else "often") for i in range(300)]
    made, _ = divided(rows)
    assert made.strata == {
        "often": {"train": 189, "eval": 54, "test": 27},
        "rare": {"train": 21, "eval": 6, "test": 3},
    }


def test_each_value_of_a_key_is_divided_by_itself(divided):
    rows = [chat(prose(i), prose(i + 500), lang="de" if i < 20 else "en") for i in range(100)]
    made, _ = divided(rows, stratify="lang", test_share=0)
    assert made.strata["de"] == {"train": 16, "eval": 4, "test": 0}
    assert "test" not in made.rows


def test_lines_are_copied_byte_by_byte_and_other_files_become_lines(write, words, tmp_path):
    line = '{"prompt":  "a\\u00e9", "completion": "1.0", "n": 1e5}\n'
    more = "".join(f'{{"prompt": "q{i}", "completion": "{i}"}}\n' for i in range(5))
    split_by_group(
        open_dataset([DataSource(path=write(line + more))], words),
        tmp_path / "p",
        eval_share=0.2,
        test_share=0,
    )
    assert (
        line in (tmp_path / "p/train.jsonl").read_text() + (tmp_path / "p/eval.jsonl").read_text()
    )
    table = write("prompt,completion\n" + "".join(f'q{i},"a,{i}"\n' for i in range(5)), "x.csv")
    split_by_group(
        open_dataset([DataSource(path=table)], words), tmp_path / "q", eval_share=0.2, test_share=0
    )
    assert '{"prompt": "q0", "completion": "a,0"}\n' in "".join(
        f.read_text() for f in (tmp_path / "q").glob("*.jsonl")
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"eval_share": 0.7, "test_share": 0.3}, "leave 0 for training"),
        ({"eval_share": -0.1}, "leave 1 for training"),
        ({"eval_share": 0, "test_share": 0}, "leave 1 for training"),
        ({"group": "page"}, "no key `page`"),
        ({"stratify": "lang"}, "no key `lang`"),
    ],
    ids=["nothing", "negative", "all", "group", "stratify"],
)
def test_what_cannot_be_divided_is_refused(divided, options, what):
    with pytest.raises(InputError, match=what):
        divided([chat(prose(i), prose(i + 500)) for i in range(20)], **options)


def test_too_few_groups_are_refused_and_nothing_is_left(divided, tmp_path):
    with pytest.raises(InputError, match=r"too few groups of related rows \(1\): eval gets none"):
        divided([chat("ask", prose(i)) for i in range(20)])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_folder_that_is_there_is_kept(write, words, tmp_path):
    (tmp_path / "mine").mkdir()
    dataset = open_dataset([DataSource(path=write(json.dumps(chat("a", "b")) + "\n"))], words)
    with pytest.raises(InputError, match="already exists"):
        split_by_group(dataset, tmp_path / "mine", eval_share=0.1, test_share=0.1)


def texts(dataset):
    return [dataset.read_example(i).text for i in range(len(dataset))]


def open_rows(write, words, rows):
    path = write("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return open_dataset([DataSource(path=path)], words)


def test_hash_split_takes_about_the_fraction_and_depends_on_the_seed():
    sides = [[is_in_split(f"row {i}", 0.1, seed) for i in range(5000)] for seed in (0, 1)]
    for side in sides:
        assert 430 < sum(side) < 570
    assert sides[0] != sides[1]
    assert sides[0] == [is_in_split(f"row {i}", 0.1, 0) for i in range(5000)]


def test_a_larger_fraction_only_adds_rows():
    small = {i for i in range(500) if is_in_split(i, 0.1)}
    assert small < {i for i in range(500) if is_in_split(i, 0.3)}


def test_split_divides_all_rows_and_keeps_equal_ones_together(write, words):
    rows = [f"row  {i % 60}" if i < 100 else f"row {i % 60}" for i in range(180)]
    rest, part = split_by_hash(open_rows(write, words, rows), 0.3, seed=2)
    assert sorted(texts(rest) + texts(part)) == sorted(rows)
    even = [{" ".join(text.split()) for text in texts(side)} for side in (rest, part)]
    assert not even[0] & even[1]
    assert len(part) % 3 == 0
    assert part.get_id(0).startswith("train.jsonl:")


def test_split_keeps_groups_on_one_side(write, words):
    dataset = open_rows(write, words, [f"row {i}" for i in range(120)])
    groups = {dataset.get_id(i): f"group {i // 4}" for i in range(100)}  # 20 rows have none
    rest, part = split_by_hash(dataset, 0.3, 0, groups)
    sides = [
        {groups[side.get_id(i)] for i in range(len(side)) if side.get_id(i) in groups}
        for side in (rest, part)
    ]
    assert not sides[0] & sides[1]
    assert all(sides)
    assert len(rest) + len(part) == 120


def test_a_split_that_leaves_a_side_empty_is_refused(write, words):
    for rows, fraction in ((["a", "a"], 0.5), (["a", "b"], 0.0), (["a", "b"], 1.0), (["a"], 0.5)):
        with pytest.raises(InputError, match="empty"):
            split_by_hash(open_rows(write, words, rows), fraction)


def test_a_run_on_split_files_finds_the_key_that_was_kept_together(words, write, tmp_path) -> None:
    rows = [chat(prose(i), prose(100 + i), author=i // 3) for i in range(60)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    whole = open_dataset([DataSource(path=write(content, "rows.jsonl"))], words)
    for key, num_groups in (("author", 4), (None, 0)):
        folder = tmp_path / f"parts of {key}"
        split_by_group(whole, folder, eval_share=0.2, test_share=0.2, group=key)
        test = open_dataset([DataSource(path=folder / "test.jsonl")], words)
        groups = map_groups(test, "auto")
        assert len(set(groups.values())) == num_groups
        assert list(groups) == ([test.get_id(row) for row in range(len(test))] if key else [])


@pytest.mark.parametrize(
    ("ids", "num_groups"),
    [
        ([f"pkg{i % 8}-{i}" for i in range(40)], 8),
        ([f"doc{i % 8}/part:{i}" for i in range(40)], 8),
        ([f"row-{i}" for i in range(40)], 0),  # plain numbers
        ([f"kind{i % 3}-{i}" for i in range(40)], 0),  # three kinds of rows
        ([f"pkg{i}-1" for i in range(40)], 0),  # each its own
        ([f"pkg{i % 8}-{i}" for i in range(39)] + ["other"], 9),  # which is alone
        ([f"row-{i}" for i in range(20)] + [f"other{i}" for i in range(20)], 0),
    ],
)
def test_groups_by_ids_need_a_plain_form(words, write, ids: list[str], num_groups: int) -> None:
    lines = [json.dumps(chat(prose(i), "yes", id=name)) + "\n" for i, name in enumerate(ids)]
    dataset = open_dataset([DataSource(path=write("".join(lines), "rows.jsonl"))], words)
    assert len(set(map_groups(dataset, "auto").values())) == num_groups
    assert map_groups(dataset, "none") == {}
