"""The page of a run folder: what it says, of which runs, and that nothing in it can break it."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fake_runs
from tunesmith import api
from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK, CheckResult, GenerationSample, Score
from tunesmith.core.types import Comparison, PlanValue
from tunesmith.report.page import render_page, write_report
from tunesmith.report.run_data import load_report_data
from tunesmith.report.samples import build_sample_diffs
from tunesmith.report.summary import build_summary

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202egnp.exe\x00\ud800&amp;"


class Checked(HTMLParser):
    """Every element that is opened is closed, in order; ids are unique."""

    VOID = ("meta", "br", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if values.get("id") else []  # type: ignore[list-item]
        self.links += [value for key, value in attrs if key in ("href", "src") and value]
        assert not [key for key, _ in attrs if key.startswith("on") or key == "style"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Checked:
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert all(link.startswith("#") and link[1:] in parser.ids for link in parser.links)
    return parser


def text_of(path: Path) -> str:
    """What the page says, without its script and style."""
    made = render_page(load_report_data(path))
    checked(made)
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", made, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def finished(tmp_path: Path, *comparisons: Comparison) -> Path:
    return fake_runs.write_run(
        tmp_path / "run", record=fake_runs.make_record(comparisons=comparisons)
    )


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("comparisons", "headline", "tone"),
    [
        (
            [fake_runs.BETTER, fake_runs.FORGOT],
            "The answers are better. General text got worse.",
            "mixed",
        ),
        ([fake_runs.BETTER], "The answers are better.", "good"),
        ([fake_runs.SAME], "No difference shown in the answers.", "open"),
        ([fake_runs.make_comparison("exact_match", 0.8, 0.1, 0.1)], "The answers are worse.", "bad"),
        (
            [fake_runs.make_comparison("loss", 2, 1, 0.1, higher_is_better=False)],
            "Test rows are predicted better.",
            "good",
        ),
        (
            [fake_runs.SAME, fake_runs.make_comparison("loss", 2, 1, 0.1, higher_is_better=False)],
            "No difference shown in the answers.",
            "open",
        ),
        ([fake_runs.FORGOT], "General text got worse.", "bad"),
        ([], "Trained, not measured", "open"),
    ],
)
def test_the_headline_says_what_the_intervals_do(
    comparisons: list[Comparison], headline: str, tone: str, tmp_path: Path
) -> None:
    found = build_summary(load_report_data(finished(tmp_path, *comparisons)))
    assert (found.headline, found.tone) == (headline, tone)
    assert text_of(tmp_path / "run").count(headline) >= 1


def test_what_one_of_several_claims_would_not_show_does_not_count(tmp_path: Path) -> None:
    weak = fake_runs.make_comparison("exact_match", 0.1, 0.2, 0.09)
    five = [weak, *(replace(fake_runs.SAME, metric=f"m{n}") for n in range(4))]
    assert (
        build_summary(load_report_data(finished(tmp_path, *five))).headline
        == "No difference shown in the answers."
    )
    assert "alone, not as one of 5 claims" in text_of(tmp_path / "run")


def test_a_loss_of_general_text_that_may_be_chance_is_not_called_none(tmp_path: Path) -> None:
    weak = fake_runs.make_comparison("bits_per_byte", 0.9, 1.0, 0.09, task=GENERAL_TASK, higher_is_better=False)
    others = [replace(fake_runs.SAME, metric=f"m{n}") for n in range(4)]
    assert (
        "may have got worse"
        in build_summary(load_report_data(finished(tmp_path, *others, weak))).headline
    )


# ---------------------------------------------------------------- what it shows


def test_everything_of_a_run_is_on_its_page(tmp_path: Path) -> None:
    said = text_of(fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record()))
    for part in (
        "0.100 → 0.800",
        "+0.700 (+0.600 to +0.800)",
        "general text , bits per byte 0.900 → 1.000 +0.100 (+0.080 to +0.120) worse",
        "seq-rep-4 0.31, base 0.02",
        "mean of the last 10 steps",
        "few rows",
        "answers are empty",
        "overlong",
        "Hu 2021",
        "measured on this machine",
        "2.0 GB 1.8 GB 0.90",
        "1:00 min to 1:20 min 1:00 min 0.86",
        "tunesmith train",
        "ab" * 32,
        "torch 2.9",
        "3 answers: 2 changed, 1 better, 1 worse.",
    ):
        assert part in said, part


def test_gain_stands_against_forgetting(tmp_path: Path) -> None:
    moved = (Score("test", "kl", 0.31, 0.2, 0.4, 40, 30),)
    run = fake_runs.write_run(
        tmp_path / "run", record=fake_runs.make_record(scales=fake_runs.make_scales(), kl_scores=kl_scores)
    )
    said = text_of(run)
    assert "2, × 0 0.9 0.8 to 1.1" in said  # held-out loss, scale, bits per byte
    assert "1, × 1 1 0.8 to 1.1" in said
    assert "From 2.000 without the trained weights to 1.000 with all of them" in said
    assert "KL divergence, nats per token 40 0.310 0.200 to 0.400" in said
    plain = fake_runs.write_run(tmp_path / "plain", record=fake_runs.make_record())
    assert "Gain against forgetting" not in text_of(plain)


def test_a_scale_that_forgets_much_less_is_offered_and_stands_in_the_verdict(
    tmp_path: Path,
) -> None:
    run = fake_runs.write_run(
        tmp_path / "run", record=fake_runs.make_record(scales=fake_runs.make_scales(fake_runs.CHEAPER))
    )
    offer = "scale 0.25 keeps 96% of the gain in loss at 25% of the forgetting"
    assert (
        f"On the rows to choose by, {offer}; other measures were not taken there."
        in build_summary(load_report_data(run)).sentence
    )
    said = text_of(run)
    assert (
        f"Offered: {offer}. Other measures may say otherwise: tunesmith compare {run}@0.25 {run}"
        in said
    )
    assert f"To have it: tunesmith export {run} --to peft --scale 0.25" in said
    whole = fake_runs.write_run(
        tmp_path / "whole", record=fake_runs.make_record(scales=fake_runs.make_scales())
    )
    assert "to choose by" not in build_summary(load_report_data(whole)).sentence
    assert (
        "Scale 1, the adapter as trained, is best: less of it keeps too little of the gain."
        in text_of(whole)
    )
    assert "--scale" not in text_of(whole)


def test_what_a_guard_does_is_on_the_curves(tmp_path: Path) -> None:
    probes = [Score("probes", "repetition", n / 10, n / 20, n / 5, 8, n * 10) for n in (1, 2, 3)]
    said = [
        CheckResult("repetition", "rollback", "seq-rep-4 0.9; back to step 10", 20),
        GenerationSample(20, "probe 1", "hi", "a a a"),
    ]
    made = render_page(
        load_report_data(
            fake_runs.write_run(tmp_path / "run", events=[*fake_runs.make_events(), *probes, *said])
        )
    )
    assert "probes: repetition" in made
    assert made.count('class="mark rollback"') == 3  # on the loss, the held-out loss and the probes
    assert "seq-rep-4 0.9; back to step 10" in text_of(tmp_path / "run")
    assert "probe 1 hi a a a" in text_of(tmp_path / "run")


def test_a_run_that_goes_on_has_a_page(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", events=fake_runs.make_events(12))
    assert "Not finished" in text_of(run)
    assert "12 of 30 steps are taken" in text_of(run)
    assert "Not finished" in text_of(fake_runs.write_run(tmp_path / "fresh", events=[]))


def test_a_run_that_a_gate_stopped_says_why(tmp_path: Path) -> None:
    stop = CheckResult(
        "failed", "stop", "preflight: row 7: loss 2 in a pack, 1 alone\n  fix: report it", 0
    )
    said = text_of(fake_runs.write_run(tmp_path / "run", events=[stop]))
    assert "A gate stopped this run" in said
    assert "loss 2 in a pack, 1 alone" in said
    assert "Nothing here may be used" in said


def test_several_stages_are_one_page(tmp_path: Path) -> None:
    said = text_of(fake_runs.write_stages(tmp_path / "run"))
    assert said.count("Stage 1-cpt") == said.count("Stage 2-sft") > 3
    assert "--adapter-from runs/again/1-cpt" in said
    assert "60 steps" in said


def test_grades_tell_better_from_worse(tmp_path: Path) -> None:
    rows = [f"test.jsonl:{number}" for number in (1, 2, 3)]

    def measured(values: list[float], answers: list[str]) -> dict:
        samples = [
            GenerationSample(0, row, "q", answer) for row, answer in zip(rows, answers, strict=True)
        ]
        one = {
            "task": "test",
            "metric": "exact_match",
            "ids": rows,
            "values": values,
            "higher_is_better": True,
        }
        return {"measurements": [one], "samples": samples}

    files = {
        "before.json": measured([0, 1, 0], ["a", "b", "c"]),
        "after.json": measured([1, 0, 0], ["x", "b", "y"]),
    }
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record(samples=()), files=files)
    found = build_sample_diffs(load_report_data(run))
    assert [(one.state, one.changed) for one in found] == [
        ("better", True),
        ("worse", False),
        ("same", True),
    ]
    assert found[0].grades == [("exact_match", 0, 1)]


def test_marks_are_against_what_was_expected(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    first = build_sample_diffs(load_report_data(run))[0]
    assert (first.before, first.after, first.expected) == (
        ["the sum is ", "five"],
        ["the sum is 5"],
        ["the sum is 5"],
    )
    free = fake_runs.write_run(
        tmp_path / "free", record=fake_runs.make_record(samples=(fake_runs.make_pair(1, "a b", "a c"),))
    )
    (one,) = build_sample_diffs(load_report_data(free))
    assert (one.before, one.after, one.expected) == (["a ", "b"], ["a ", "c"], [])


# ---------------------------------------------------------------- what cannot break it


def hostile_run(path: Path) -> Path:
    samples = (
        fake_runs.make_pair(1, HOSTILE, HOSTILE + "x" * 50_000, HOSTILE),
        (GenerationSample(0, HOSTILE, HOSTILE, "a"),) * 2,
    )
    finding = replace(
        fake_runs.FINDING, message=HOSTILE, rows=(HOSTILE,), check=HOSTILE, fix=HOSTILE
    )
    report = replace(
        fake_runs.REPORT, path=HOSTILE, format=HOSTILE, findings=(finding,), dropped={HOSTILE: 1}
    )
    template = PlanValue(HOSTILE, "rule", HOSTILE, "Hu 2021", "published", "the same")
    plan = replace(
        fake_runs.PLAN.with_settings(template=template),
        data={HOSTILE: report},
        warnings=(HOSTILE,),
        seconds_source=HOSTILE,
    )
    comparison = fake_runs.make_comparison(HOSTILE, 0.1, 0.9, 0.1, task=HOSTILE)
    events = [
        *fake_runs.make_events(),
        CheckResult(HOSTILE, "warn", HOSTILE, 3),
        GenerationSample(4, HOSTILE, HOSTILE, HOSTILE),
    ]
    events += [Score(HOSTILE, HOSTILE, 1.0, 0.5, 2.0, 3, step) for step in (1, 2, 3)]
    record = fake_runs.make_record(plan, comparisons=(comparison,), samples=samples, input_changes=(HOSTILE,))
    return fake_runs.write_run(path, plan=plan, record=record, events=events)


def test_hostile_words_are_words(tmp_path: Path) -> None:
    made = render_page(load_report_data(hostile_run(tmp_path / "run")))
    found = checked(made)
    assert found.tags.count("script") == 2  # the data of the answers, and ours
    assert "img" not in found.tags
    assert not re.search("[\x00\u202e\ud800]", made)
    assert "U+202E" in made


def test_nothing_is_loaded_and_only_ours_may_run(tmp_path: Path) -> None:
    made = render_page(
        load_report_data(fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record()))
    )
    assert not re.findall(r"https?:|@import|url\(|<link|<iframe|<img", made)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', made)
    assert policy is not None
    assert "default-src &#x27;none&#x27;" in policy[1]
    assert "unsafe" not in policy[1]
    assert policy[1].count("sha256-") == 2


# ---------------------------------------------------------------- the verb


def test_it_is_written_whole_beside_the_run_or_elsewhere(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    assert api.write_report(run) == run / "report.html"
    assert (
        api.write_report(str(run), tmp_path / "other.html").read_text()
        == (run / "report.html").read_text()
    )
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="choose another --out"):
        write_report(run, tmp_path / "none" / "page.html")
    (run / "record.json").write_text("{")
    with pytest.raises(InputError, match=r"record\.json:1"):
        write_report(run)
    assert (run / "report.html").stat().st_size > 10_000
