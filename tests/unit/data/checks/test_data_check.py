"""What the data check says of all rows together."""

import json
import random
import sys

import numpy as np
import pytest

from tunesmith.data.checks import contradicted, language_id, minhash, ngrams
from tunesmith.data.checks.ngrams import exclude_values, hash_ngrams, hash_unique_ngrams, hash_words
from tunesmith.data.checks.run import check_data
from tunesmith.data.dataset import open_dataset
from tunesmith.recipe.fields import DataSource

WORDS = [f"{a}{b}{c}" for a in "bdfglmn" for b in "aeiou" for c in "krstv"]


def prose(seed, count=40):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def chat(user, answer):
    return {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    }


@pytest.fixture
def report(write, words):
    """Roles of rows -> the findings of the last role by name of the check, the reports beside
    it."""

    def of(*, schema=None, pairs=False, labels=False, **roles):
        row_kind = "pair" if pairs else "labelled" if labels else "answer"
        opened = {}
        for role, rows in roles.items():
            path = write("".join(json.dumps(row) + "\n" for row in rows), f"{role}.jsonl")
            opened[role] = open_dataset([DataSource(path=path)], words, row_kind=row_kind)
        reports = check_data(opened, schema=schema, should_read_all=True)
        return {finding.check: finding for finding in list(reports.values())[-1].findings}

    return of


def rows(count, start=0):
    return [chat(prose(2 * i), f"{prose(2 * i + 1)}.") for i in range(start, start + count)]


def test_rows_that_are_fine_have_no_findings(report):
    assert report(data=rows(60)) == {}


# ---------------------------------------------------------------- copies


def test_near_duplicates_are_found_with_the_row_they_are_like(report):
    near_copy = chat(prose(6) + " indeed", prose(7).replace(WORDS[0], "zzz"))
    finding = report(data=[*rows(40), near_copy])["near_duplicates"]
    assert (finding.count, finding.rows) == (1, ("data.jsonl:41 = data.jsonl:4",))
    assert "1 of 41 rows repeats an earlier row almost exactly" in finding.message


def test_a_frame_that_all_rows_have_makes_no_duplicates(report):
    frame = prose(1, 200)
    framed = [chat(f"{frame} {prose(100 + i, 12)}", f"{prose(200 + i, 8)}.") for i in range(60)]
    assert report(data=framed) == {}
    copy = chat(f"{frame} {prose(103, 12)}!", prose(203, 8))
    assert report(data=[*framed, copy])["near_duplicates"].rows == ("data.jsonl:61 = data.jsonl:4",)


def test_held_out_rows_that_are_nearly_trained_are_an_error(report):
    held_out = [*rows(20, start=100), chat(prose(6), prose(7) + " so")]
    findings = report(data=rows(40), eval_data=held_out)
    assert (findings["near_leaks"].level, findings["near_leaks"].rows) == (
        "error",
        ("eval_data.jsonl:21 = data.jsonl:4",),
    )
    assert findings["ngram_overlap"].level == "error"
    assert findings["ngram_overlap"].rows == ("eval_data.jsonl:21",)


def test_a_long_passage_in_common_is_told_and_less_than_thirteen_words_is_not(report):
    passage = " ".join(prose(6).split()[:20])
    held_out = [
        chat(prose(300) + " " + passage, prose(301)),
        chat(prose(302) + " " + prose(6)[:40], prose(303)),
    ]
    finding = report(data=rows(40), test_data=held_out)["ngram_overlap"]
    assert (finding.level, finding.count, finding.rows) == ("info", 1, ("test_data.jsonl:1",))


def test_an_instruction_and_one_more_word_are_no_passage(report):
    instruction = prose(1, 80)
    train = [chat(f"{instruction} zzz{i % 30} {prose(2 * i, 20)}", "yes.") for i in range(60)]
    held_out = [chat(f"{instruction} zzz{i} {prose(200 + i, 20)}", "yes.") for i in range(20)]
    assert "ngram_overlap" not in report(data=train, test_data=held_out)


def test_shares_of_passages_stay_right_when_only_some_are_kept(monkeypatch):
    texts = [[hash_words(prose(i, 2000))] for i in range(4)]
    for most in (2**24, 1000):
        monkeypatch.setattr(ngrams, "MAX_NGRAMS", most)
        passages = ngrams.NgramIndex(texts, np.empty(0, np.uint64))
        passages.mark_trained([texts[1][0], texts[2][0][:1000]])
        share_N = passages.compute_overlap(np.empty(0, np.uint64)).share_N
        assert share_N.tolist()[::3] == [0, 0]
        assert share_N[1] == 1
        assert share_N[2] == pytest.approx(0.5, abs=0.05)
    assert len(passages.grams_Q) <= 1000


def test_without_datasketch_the_rest_is_said(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    findings = report(
        data=[*rows(40), chat("q", "As an AI, no."), chat(prose(6) + " indeed", prose(7))]
    )
    assert findings["near_duplicates"].message.endswith("datasketch is not installed")
    assert findings["near_duplicates"].fix == "pip install '.[audit]' in tunesmith's folder"
    assert findings["disclaimers"].count == 1


def test_one_question_with_several_answers(report):
    prompts = [*rows(20), chat("ask", "one"), chat(" ask ", "two"), chat("ask", "one")]
    finding = report(data=prompts)["conflicts"]
    assert (finding.level, finding.count) == ("warn", 3)
    assert finding.message == "3 of 23 rows have a prompt with several answers; such prompts: 1"
    assert finding.rows == ("data.jsonl:21", "data.jsonl:22", "data.jsonl:23")


def test_a_question_is_the_same_in_capitals_and_without_its_mark(report):
    finding = report(
        data=[*rows(20), chat("When does it open?", "at nine"), chat("when does it OPEN", "at ten")]
    )
    assert finding["conflicts"].count == 2


def test_no_finding_shows_a_secret_whole(report):
    """Labels quote answers."""
    token = "ghp_" + "a1B2" * 9
    labels = report(data=[chat(prose(i), (token, "other")[i % 2]) for i in range(60)])
    assert "classes" in labels
    assert token[:20] not in repr([*labels.values()])


def test_all_rows_of_a_finding_are_named(report):
    findings = report(
        data=[*rows(60), *(chat(prose(900 + i), "I cannot help with that.") for i in range(19))]
    )
    assert findings["refusals"].count == len(findings["refusals"].rows) == 19


@pytest.mark.parametrize(
    ("few", "says"), [(True, "has a system message"), (False, "has no system message")]
)
def test_of_system_turns_the_odd_rows_are_named(report, few, says):
    bare = rows(20)
    full = [
        {"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]}
        for row in rows(20, 20)
    ]
    finding = report(data=[*bare, full[0]] if few else [*full, bare[0]])["system_turns"]
    assert finding.rows == ("data.jsonl:21",)
    assert says in finding.message


def test_a_row_that_cannot_be_rendered_has_no_system_message(report):
    findings = report(data=[*rows(20), chat("unrenderable", "a")])
    assert "rejected" in findings
    assert "system_turns" not in findings


def test_grams_are_runs_of_words_whatever_the_case_and_the_signs():
    first, second = (
        hash_words(text) for text in ('The "old" clock, in the hall.', "the old CLOCK in the-hall")
    )
    assert first.tolist() == second.tolist()
    assert len(hash_ngrams(first, 3)) == 4
    assert len(hash_ngrams(first[:2], 3)) == 1
    assert len(hash_unique_ngrams([first, second[:4], hash_words("")], 3)) == 4
    assert len(hash_words("時計は何時ですか")) == 8
    assert exclude_values(
        np.array([1, 5, 9], np.uint64), np.array([5, 10], np.uint64)
    ).tolist() == [1, 9]


def test_candidates_are_rows_that_share_a_band():
    bands_MB = np.array([[1, 10], [2, 20], [1, 30], [3, 20], [1, 40]], dtype=np.uint64)
    assert minhash.find_candidates(bands_MB).tolist() == [[0, 2], [0, 4], [1, 3], [2, 4]]
    assert minhash.find_candidates(bands_MB[:0]).tolist() == []


@pytest.mark.parametrize(("changed", "least", "most"), [(1, 0.95, 1.0), (12, 0.0, 0.0)])
def test_bands_find_alike_rows_and_no_others(changed, least, most):
    signer = minhash.MinHasher()
    num_pairs = 0
    for seed in range(40):
        text = prose(seed, 80).split()
        other = [*text]
        for position in range(0, changed * 5, 5):
            other[position] = "zzz"
        grams = [
            hash_unique_ngrams([hash_words(" ".join(words))], minhash.SHINGLE_WORDS)
            for words in (text, other)
        ]
        bands_MB = np.stack([signer.compute_bands(row_grams) for row_grams in grams])
        num_pairs += minhash.find_first_rows(bands_MB, grams.__getitem__).tolist() == [0, 0]
    assert least <= num_pairs / 40 <= most


# ---------------------------------------------------------------- spread


def test_what_a_max_length_would_cut(report):
    long = [
        chat("ask", " ".join(f"w{i}" for i in range(300))),
        chat("ask it", " ".join(f"v{i}" for i in range(600))),
    ]
    message = report(data=[*rows(18), *long])["lengths"].message
    assert message == (
        "tokens of 20 documents: 2 (10.0%) above 256, 1 (5.0%) above 512; maximum 608"
    )


def test_answers_that_are_no_json_among_those_that_are(report):
    answers = [f'{{"n": {i}}}' for i in range(40)]
    finding = report(
        data=[chat(f"ask {i}", a) for i, a in enumerate([*answers, "n is 3", '{"n": 3'])]
    )["broken_json"]
    assert (finding.count, finding.rows) == (2, ("data.jsonl:41", "data.jsonl:42"))
    assert "2 of 42 answers are not JSON (1 malformed)" in finding.message


def test_answers_cut_at_one_length(report):
    cut = [chat(prose(i), prose(500 + i, 200)[:250]) for i in range(30)]
    assert (
        "30 different answers have exactly 250 characters"
        in report(data=[*rows(30, 50), *cut])["cut_off"].message
    )


def test_prompts_and_answers_far_longer_or_shorter(report):
    finding = report(data=[*rows(40), chat("Why?", prose(1, 8000))])["outliers"]
    assert finding.rows == ("data.jsonl:41",)


def test_languages_of_the_answers_and_rows_in_a_rare_one(report):
    english = (
        "The old clock in the hall is {} minutes late, and nobody in the house has noticed it for"
        " weeks."
    )
    german = (
        "Die alte Uhr im Flur geht seit Wochen nach, und niemand im ganzen Haus hat es bemerkt."
    )
    mixed = [*(chat(f"q{i}", english.format(i)) for i in range(60)), chat("q", german)]
    finding = report(data=mixed)["languages"]
    assert finding.message == (
        "languages of 61 answers: en 98.4%, de 1.6%; rows with a prompt or answer in another"
        " language: 1"
    )
    assert finding.rows == ("data.jsonl:61",)
    assert language_id.detect_language("def f(x): return x") == -1


QUESTIONS = ("Where is the key of clock {}?", "Who repaired the clock in room {}?")
ANSWERS = ("It hangs behind door {}.", "The clockmaker did, on day {}.")


def test_short_prompts_and_answers_in_another_language(report):
    english = [chat(QUESTIONS[i % 2].format(i), ANSWERS[i % 2].format(i)) for i in range(80)]
    planted = [
        chat("Wo ist der Schlüssel für die Uhr?", ANSWERS[0]),
        chat(QUESTIONS[0].format(81), "No lo sé, pregunte al relojero."),
        chat(QUESTIONS[1].format(82), "我不知道。"),
        chat(QUESTIONS[1].format(83), "Johann Gottfried von Herder"),  # a name has no language
    ]
    finding = report(data=[*english, *planted])["languages"]
    assert finding.rows == ("data.jsonl:81", "data.jsonl:82", "data.jsonl:83")
    assert finding.level == "warn"


def test_an_instruction_of_all_prompts_does_not_hide_their_language(report):
    frame = "Answer the following question in one short sentence, and do not explain it.\n"
    english = [
        chat(frame + QUESTIONS[i % 2].format(i), ANSWERS[i % 2].format(i)) for i in range(80)
    ]
    german = chat(f"{frame}Wer hat die Uhr im Flur repariert?", ANSWERS[1])
    assert report(data=[*english, german])["languages"].rows == ("data.jsonl:81",)


def test_a_data_set_of_two_languages_has_no_foreign_rows(report):
    mixed = [
        chat(
            QUESTIONS[i % 2].format(i),
            ("Das weiß ich leider nicht, Nummer {}.", ANSWERS[1])[i % 2].format(i),
        )
        for i in range(80)
    ]
    assert "languages" not in report(data=mixed)


def test_pairs_in_which_length_is_all_that_differs(report):
    pairs = [
        {"prompt": f"q{i}", "chosen": prose(i, 30), "rejected": prose(900 + i, 8)}
        for i in range(30)
    ]
    findings = report(data=pairs, pairs=True)
    assert findings["length_bias"].message.startswith(
        "the longer answer is preferred in 100% of 30 pairs"
    )
    even = [
        dict(pair, chosen=pair["rejected"], rejected=pair["chosen"]) if i % 2 else pair
        for i, pair in enumerate(pairs)
    ]
    assert "length_bias" not in report(data=even, pairs=True)


# ---------------------------------------------------------------- classes


def labelled(counts):
    names = [name for name, count in counts.items() for _ in range(count)]
    return [chat(prose(i), name) for i, name in enumerate(names)]


def test_labels_and_how_rows_are_spread_over_them(report):
    finding = report(data=labelled({"spam": 30, "ham": 20}))["classes"]
    message = "2 labels: 'spam' 30 (60%), 'ham' 20 (40%)"
    assert (finding.level, finding.message) == ("info", message)
    finding = report(data=labelled({"spam": 90, "ham": 12, "hma": 3}))["classes"]
    assert (finding.level, finding.rows[0]) == ("warn", "data.jsonl:103")
    assert finding.message.endswith("; fewer than 10 rows: 'hma' 3")
    assert "macro_f1" in finding.fix


def test_labels_of_test_rows_are_compared_with_those_of_training_rows(report):
    training = labelled({"spam": 30, "ham": 20, "Ham": 10})
    finding = report(data=training, test_data=labelled({"spam": 3, "ham": 1, "eggs": 1}))["classes"]
    assert (finding.level, finding.rows) == ("warn", ("test_data.jsonl:5",))
    assert "3 labels: 'spam' 3 (60%), 'eggs' 1 (20%)" in finding.message
    assert "in no training row: 'eggs' 1" in finding.message
    assert "graded as different: 'ham' = 'Ham'" in finding.message


def test_equal_shares_of_labels_are_told_once(report):
    training, test = labelled({"spam": 30, "ham": 20}), labelled({"spam": 24, "ham": 16})
    finding = report(data=training, test_data=test)["classes"]
    assert (finding.level, finding.message) == ("info", "2 labels with the shares of data")
    finding = report(data=training, test_data=labelled({"spam": 25, "ham": 15}))["classes"]
    assert "'spam' 25 (62%)" in finding.message


def test_a_label_that_stands_in_the_question(report):
    copied = [
        chat(f"{prose(i)} [label: {name}]", name) for i, name in enumerate(["spam", "ham"] * 20)
    ]
    assert report(data=copied)["label_in_prompt"].level == "error"
    prompts = [
        chat(f"spam or ham? {prose(i)}", name) for i, name in enumerate(["spam", "ham"] * 20)
    ]
    assert "label_in_prompt" not in report(data=prompts)


def test_a_run_looks_only_at_what_it_needs(write, words):
    path = write("".join(json.dumps(row) + "\n" for row in [*rows(20), chat("q", "As an AI, no.")]))
    assert check_data({"data": open_dataset([DataSource(path=path)], words)})["data"].findings == ()


def test_the_first_row_with_a_document_is_kept_for_the_report(write, words):
    secret = "ghp_" + "a1B2" * 9
    lines = [{"messages": []}, chat(f"my key is {secret}", "noted"), chat("q", "no")]
    path = write("".join(json.dumps(row) + "\n" for row in lines))
    datasets = {
        role: open_dataset([DataSource(path=path)], words) for role in ("data", "eval_data")
    }
    reports = check_data(datasets)
    parts = reports["data"].first_row
    assert [part.weight for part in parts] == [0, 1]
    assert parts[1].text.startswith("noted")
    assert "my key is " in parts[0].text
    assert secret not in parts[0].text
    assert reports["eval_data"].first_row == ()


def test_near_leaks_are_found_in_every_earlier_role(report):
    """A held-out row may be nearly equal to one of the second role before it."""
    eval_rows = rows(20, start=100)
    near_copy = chat(prose(2 * 103), prose(2 * 103 + 1) + " so")
    findings = report(data=rows(40), eval_data=eval_rows, test_data=[*rows(20, 200), near_copy])
    assert findings["near_leaks"].rows == ("test_data.jsonl:21 = eval_data.jsonl:4",)


def test_many_more_answers_of_one_label_are_said(report):
    def label(count):
        return [{**row, "label": index < count} for index, row in enumerate(rows(60))]

    assert "label_balance" not in report(data=label(32), labels=True)
    few = report(data=label(10), labels=True)["label_balance"]
    assert few.message == "10 desirable and 50 undesirable answers"
    assert "desirable_weight: 5" in few.fix
    assert "undesirable_weight: 3.75" in report(data=label(50), labels=True)["label_balance"].fix
    assert "label_balance" not in report(data=label(10))


# ---------------------------------------------------------------- rows that the others contradict


TOPICS = {
    "sport": ("the team won the match", "a late goal in the final", "the coach left the club"),
    "food": ("boil the rice and the beans", "a cake with butter", "salt and pepper on the soup"),
    "weather": ("rain and wind from the west", "a cold night with snow", "clouds and sun today"),
}


def reports_of(topic, count):
    """Texts of a topic, each with a few words of its own."""
    phrases = TOPICS[topic]
    return [f"{phrases[i % 3]}, {phrases[(i + 1) % 3]} {prose(i, 4)}" for i in range(count)]


def topics(count):
    texts = [(text, topic) for topic in TOPICS for text in reports_of(topic, count)]
    return [chat(text, topic) for text, topic in texts]


def test_wrong_labels_are_named_with_the_likely_one(report):
    labelled_rows = topics(60)
    labelled_rows[7] = chat(labelled_rows[7]["messages"][0]["content"], "weather")
    finding = report(data=labelled_rows)["mislabelled"]
    assert (finding.level, finding.count) == ("info", 1)
    assert finding.rows == ("data.jsonl:8 'weather', not 'sport'?",)


def test_right_labels_are_not_named_and_labels_by_chance_cannot_be_judged(report):
    assert "mislabelled" not in report(data=topics(60))
    shuffled = random.Random(0).choices(["sport", "food"], k=120)
    rows = [chat(prose(i), label) for i, label in enumerate(shuffled)]
    finding = report(data=rows)["mislabelled"]
    assert (finding.count, finding.rows) == (0, ())
    assert "not checked" in finding.message


def test_labels_are_judged_though_a_tenth_of_the_answers_is_none(report):
    odd = [chat(prose(500 + i), f"{prose(600 + i, 20)}\nand more") for i in range(20)]
    labelled_rows = [*topics(60), *odd]
    labelled_rows[7] = chat(labelled_rows[7]["messages"][0]["content"], "weather")
    findings = report(data=labelled_rows)
    assert findings["mislabelled"].rows == ("data.jsonl:8 'weather', not 'sport'?",)
    assert findings["classes"].count == len(odd)


def test_a_label_in_brackets_is_given_away(report):
    labelled_rows = topics(60)
    text, label = (m["content"] for m in labelled_rows[4]["messages"])
    labelled_rows[4] = chat(f"{text} [{label}]", label)
    labelled_rows[5] = chat(f'"sport", "food" or "weather"? {text}', label)
    assert report(data=labelled_rows)["label_in_prompt"].rows == ("data.jsonl:5",)


def test_rare_answers_hide_no_label_that_the_instruction_lists(report):
    rows = [
        chat(f"sport, food or weather? {text}", topic)
        for topic in TOPICS
        for text in reports_of(topic, 60)
    ]
    odd = [chat(prose(700 + i), f"{WORDS[i]} {i}") for i in range(15)]
    assert "label_in_prompt" not in report(data=[*rows, *odd])


def questions(count):
    return [
        chat(f"how do I use {prose(i, 3)}?", f"call {prose(900 + i, 6)} and read the result.")
        for i in range(count)
    ]


def test_a_swapped_question_and_answer_are_found(report):
    swapped = questions(120)
    question, answer = (m["content"] for m in swapped[11]["messages"])
    swapped[11] = chat(answer, question)
    assert report(data=swapped)["swapped"].rows == ("data.jsonl:12",)
    assert "swapped" not in report(data=questions(120))


def test_what_words_do_not_tell_apart_is_said(report, monkeypatch):
    same_words = [chat(prose(2 * i), prose(2 * i + 1)) for i in range(120)]
    finding = report(data=same_words)["swapped"]
    assert (finding.level, finding.count) == ("info", 0)
    assert "not checked" in finding.message
    monkeypatch.setattr(contradicted, "find_spec", lambda _: None)
    for check, rows_of in (("swapped", questions(120)), ("mislabelled", topics(60))):
        finding = report(data=rows_of)[check]
        assert (finding.count, finding.fix) == (0, "pip install '.[audit]' in tunesmith's folder")


def test_an_answer_that_ends_within_a_word_is_found(report):
    answers = [chat(prose(2 * i), prose(2 * i + 1)) for i in range(40)]
    answers[3] = chat("say what it is", "a description of the transmis")
    answers[4] = chat("and what the transmission is", "the transmission of the engines")
    answers[5] = chat("and the engine", "nothing but the engine")  # a singular
    assert report(data=answers)["cut_words"].rows == ("data.jsonl:4",)


def test_an_answer_without_the_mark_at_the_end_of_the_others_is_found(report):
    answers = questions(120)
    answers[9] = chat("how do I use it?", "call the function and")
    answers[10] = chat("how do I use that?", "call the functions, read and write")
    assert report(data=answers)["cut_words"].rows == ("data.jsonl:10", "data.jsonl:11")
    assert "cut_words" not in report(data=questions(120))
