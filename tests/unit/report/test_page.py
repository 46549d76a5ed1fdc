"""The page of a run folder: what it shows for each kind of run, and that no content breaks it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import get_args

import pytest

import fake_runs
from tunesmith import api
from tunesmith.cli.views import render_table
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, GenerationSample, Score
from tunesmith.core.evidence import (
    Confusion,
    ErrorAnalysis,
    ErrorGroup,
    ErrorTable,
    NextStep,
    RunVerdict,
    Shortcut,
    VerdictName,
)
from tunesmith.core.json_io import to_jsonable
from tunesmith.core.run_dir import EVAL_AFTER_FILE, EVAL_BEFORE_FILE
from tunesmith.core.types import Comparison, PlanValue
from tunesmith.evaluate.results import EvalResults, MetricValues
from tunesmith.evaluate.scale_choice import tabulate_scales
from tunesmith.report.page import render_page, write_report
from tunesmith.report.run_data import load_report_data
from tunesmith.report.samples import (
    build_sample_diffs,
    build_samples,
)
from tunesmith.report.summary import TONES, Outcome, Summary, build_summary

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    "\u202egnp.exe\x00\ud800&amp;"
)
WORSE = fake_runs.make_comparison("exact_match", 0.8, 0.1, 0.1)
LOWER_LOSS = fake_runs.make_comparison("loss", 2, 1, 0.1, higher_is_better=False)


class PageParser(HTMLParser):
    """Collect tags, ids and links; every element is closed in order."""

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


def parse_page(html: str) -> PageParser:
    parser = PageParser()
    parser.feed(html)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert all(link.startswith("#") and link[1:] in parser.ids for link in parser.links)
    return parser


def read_text(path: Path) -> str:
    """Return the text of the page, without its script and style."""
    html = render_page(load_report_data(path))
    parse_page(html)
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def summarize(tmp_path: Path, *comparisons: Comparison) -> Summary:
    record = fake_runs.make_record(comparisons=comparisons)
    return build_summary(load_report_data(fake_runs.write_run(tmp_path / "run", record=record)))


def test_a_check_of_nothing_is_no_failure_and_forgetting_is_said_once(tmp_path: Path) -> None:
    empty = CheckResult("packing", "warn", "no pack of two rows", num_checked=0)
    preflight = (*fake_runs.make_record().preflight, empty)
    record = fake_runs.make_record(comparisons=(), preflight=preflight)
    summary = build_summary(load_report_data(fake_runs.write_run(tmp_path / "run", record=record)))
    counts = "1 of 1 applicable preflight checks passed"
    assert any(line.startswith(counts) for line in summary.evidence)
    said = [*summary.costs, *summary.verdict.reasons]
    assert sum("orgetting was not measured" in line for line in said) == 1


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("comparisons", "headline", "tone"),
    [
        ([fake_runs.BETTER], "Useful, not ready", "mixed"),
        ([fake_runs.BETTER, fake_runs.FORGOT], "Useful, not ready", "mixed"),
        ([fake_runs.SAME], "No effect", "open"),
        ([WORSE], "Harmful", "bad"),
        ([fake_runs.FORGOT], "Not measured", "open"),
        ([], "Not measured", "open"),
    ],
)
def test_the_headline_is_the_verdict(
    comparisons: list[Comparison], headline: str, tone: str, tmp_path: Path
) -> None:
    summary = summarize(tmp_path, *comparisons)
    assert (summary.headline, summary.tone) == (headline, tone)
    html = render_page(load_report_data(tmp_path / "run"))
    assert f'<h1 id="verdict-title">{headline}</h1>' in html
    assert f"<title>run: {headline}</title>" in html


def test_every_verdict_has_a_tone() -> None:
    assert set(TONES) == set(get_args(VerdictName))


def test_a_change_that_does_not_survive_holm_correction_is_marked(tmp_path: Path) -> None:
    weak = fake_runs.make_comparison("exact_match", 0.1, 0.2, 0.09)
    five = [weak, *(replace(fake_runs.SAME, metric=f"m{n}") for n in range(4))]
    assert summarize(tmp_path, *five).headline == "No effect"
    text = read_text(tmp_path / "run")
    assert "better, but not after Holm correction (5 comparisons)" in text


FEW = Score("test", "exact_match", 0.5, 0.0, 1.0, 4, 0)


def test_too_few_items_are_neither_better_nor_the_same(tmp_path: Path) -> None:
    summary = summarize(tmp_path, replace(WORSE, after=FEW))
    assert summary.headline == "Not measured"
    html = render_page(load_report_data(tmp_path / "run"))
    assert '<b class="outcome unclear">too few items to tell</b>' in html


def test_every_outcome_has_a_color() -> None:
    style = files("tunesmith.report").joinpath("page.css").read_text()
    rules = re.findall(r"^(\S[^{]*)\{([^}]*)\}", style, flags=re.MULTILINE)
    colored: set[str] = set()
    for selectors, body in rules:
        if "color:" in body:
            colored.update(re.findall(r"\.outcome\.(\w+)", selectors))
    assert colored >= set(get_args(Outcome))


def test_a_custom_metric_of_a_folder_is_a_metric_of_the_answers(tmp_path: Path) -> None:
    """The plan has its path, scores have its file's name alone."""
    custom = PlanValue((f"{tmp_path}/metrics/mine.py:score", "exact_match"), "user", "")
    plan = fake_runs.PLAN.with_settings(metrics=custom)
    likelihood = replace(LOWER_LOSS, metric="bits_per_byte")
    comparisons = (replace(fake_runs.BETTER, metric="mine.py:score"), likelihood)
    record = fake_runs.make_record(plan, comparisons=comparisons, samples=())
    rows = ("test.jsonl:1", "test.jsonl:2")
    results: list[dict] = []
    for values in ((0.0, 0.5), (1.0, 0.25)):
        measurement = MetricValues("test", "mine.py:score", rows, values)
        samples = tuple(GenerationSample(0, row, "q", "a") for row in rows)
        results.append(to_jsonable(EvalResults((measurement,), samples)))
    result_files = dict(zip((EVAL_BEFORE_FILE, EVAL_AFTER_FILE), results, strict=True))
    run = load_report_data(
        fake_runs.write_run(tmp_path / "run", plan=plan, record=record, files=result_files)
    )
    changes = build_summary(run).changes
    assert [claim.comparison.metric for claim in changes] == ["mine.py:score", "bits_per_byte"]
    assert [diff.grades for diff in build_sample_diffs(run)] == [
        [("mine.py:score", 0, 1)],
        [("mine.py:score", 0.5, 0.25)],
    ]


# ---------------------------------------------------------------- what it shows


def test_everything_about_a_run_is_on_its_page(tmp_path: Path) -> None:
    text = read_text(fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record()))
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
        "1 min 0 s to 1 min 20 s 1 min 0 s 0.86",
        "tunesmith train",
        "ab" * 32,
        "torch 2.9",
        "3 answers, wrong ones first.",
        "Peak memory 2.0 GB",
        "set in the recipe",
    ):
        assert part in text, part
    html = render_page(load_report_data(tmp_path / "run"))
    assert 'aria-label="+0.700, from +0.600 to +0.800: better"' in html


def test_scales_trade_gain_for_forgetting(tmp_path: Path) -> None:
    kl_scores = (Score("test", "kl", 0.31, 0.2, 0.4, 40, 30),)
    record = fake_runs.make_record(scales=fake_runs.make_scales(), kl_scores=kl_scores)
    text = read_text(fake_runs.write_run(tmp_path / "run", record=record))
    assert "Adapter-scale trade-off" in text
    assert '<th scope="col"></th>' not in text  # an empty header is nothing to a screen reader
    shown = render_table(tabulate_scales(record.scales))
    for column in shown.columns:  # the table of the terminal
        assert all(str(cell) in text for cell in column.cells)
    assert "KL(base ‖ tuned), nats/token 40 0.310 0.200 to 0.400" in text
    plain = fake_runs.write_run(tmp_path / "plain", record=fake_runs.make_record())
    assert "Adapter-scale trade-off" not in read_text(plain)


def test_a_scale_that_forgets_much_less_is_recommended_in_the_verdict(tmp_path: Path) -> None:
    record = fake_runs.make_record(scales=fake_runs.make_scales(fake_runs.CHEAPER))
    run = fake_runs.write_run(tmp_path / "run", record=record)
    tradeoff = "scale 0.25 keeps 96% of the gain in loss at 25% of the forgetting"
    sentence = build_summary(load_report_data(run)).sentence
    assert f"On eval_data, {tradeoff}; not yet checked on the graded metrics." in sentence
    text = read_text(run)
    assert f"Recommended: {tradeoff}. Verify it on test_data, then export it:" in text
    assert "tunesmith compare run@0.25 run Copy" in text
    assert "tunesmith export run --to peft --scale 0.25 Copy" in text


def test_without_a_better_scale_none_is_recommended(tmp_path: Path) -> None:
    record = fake_runs.make_record(scales=fake_runs.make_scales())
    run = fake_runs.write_run(tmp_path / "run", record=record)
    assert "On eval_data" not in build_summary(load_report_data(run)).sentence
    text = read_text(run)
    assert "Scale 1, the adapter as trained, is best: a smaller scale keeps too little" in text
    assert "--scale" not in text


def test_the_guard_is_on_the_curves(tmp_path: Path) -> None:
    probes = [Score("probes", "repetition", n / 10, n / 20, n / 5, 8, n * 10) for n in (1, 2, 3)]
    guard_events = [
        CheckResult("repetition", "rollback", "seq-rep-4 0.9; back to step 10", 20),
        GenerationSample(20, "probe 1", "hi", "a a a"),
    ]
    events = [*fake_runs.make_events(), *probes, *guard_events]
    html = render_page(load_report_data(fake_runs.write_run(tmp_path / "run", events=events)))
    assert "probes: repetition (n = 8)" in html
    assert html.count('class="mark rollback"') == 3  # on the loss, the held-out loss and the probes
    text = read_text(tmp_path / "run")
    assert "seq-rep-4 0.9; back to step 10" in text
    assert "probe 1 hi a a a" in text


def test_an_unfinished_run_has_a_page(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", events=fake_runs.make_events(12))
    assert "Not finished" in read_text(run)
    assert "12 of 30 steps are done" in read_text(run)
    assert "Not finished" in read_text(fake_runs.write_run(tmp_path / "fresh", events=[]))


def test_a_run_that_a_check_stopped_says_why(tmp_path: Path) -> None:
    stop = CheckResult(
        "failed", "stop", "preflight: row 7: loss 2 in a pack, 1 alone\n  fix: report it", 0
    )
    text = read_text(fake_runs.write_run(tmp_path / "run", events=[stop]))
    assert "A check stopped this run" in text
    assert "loss 2 in a pack, 1 alone" in text
    assert "Nothing here may be used" in text


def test_several_stages_are_one_page(tmp_path: Path) -> None:
    text = read_text(fake_runs.write_stages(tmp_path / "run"))
    assert text.count("Stage 1-cpt") == text.count("Stage 2-sft") > 3
    assert "--adapter-from runs/again/1-cpt" in text
    assert "60 steps" in text
    assert build_summary(load_report_data(tmp_path / "run")).cautions.count("few rows") == 1


def test_each_stage_has_one_seed(tmp_path: Path) -> None:
    data = load_report_data(fake_runs.write_stages(tmp_path / "run"))
    rest = ": the intervals do not cover seed-to-seed variation."
    assert f"One seed only (0){rest}" in build_summary(data).evidence
    plan = data.stages[1].plan.with_settings(seed=PlanValue(1, "user", ""))
    stages = (data.stages[0], replace(data.stages[1], plan=plan))
    evidence = build_summary(replace(data, stages=stages)).evidence
    assert f"One seed only for each stage (0, 1){rest}" in evidence


def test_grades_decide_right_and_wrong(tmp_path: Path) -> None:
    rows = [f"test.jsonl:{number}" for number in (1, 2, 3)]

    def make_results(values: list[float], answers: list[str]) -> dict:
        samples = [
            GenerationSample(0, row, "q", answer) for row, answer in zip(rows, answers, strict=True)
        ]
        measurement = {
            "task": "test",
            "metric": "exact_match",
            "ids": rows,
            "values": values,
            "higher_is_better": True,
        }
        return {"measurements": [measurement], "samples": samples}

    files = {
        EVAL_BEFORE_FILE: make_results([0, 1, 0], ["a", "b", "c"]),
        EVAL_AFTER_FILE: make_results([1, 0, 0], ["x", "b", "y"]),
    }
    record = fake_runs.make_record(samples=())
    run = fake_runs.write_run(tmp_path / "run", record=record, files=files)
    diffs = build_sample_diffs(load_report_data(run))
    assert [(diff.state, diff.changed) for diff in diffs] == [
        ("fixed", True),
        ("broken", False),
        ("wrong", True),
    ]
    assert diffs[0].grades == [("exact_match", 0, 1)]
    view = build_samples(load_report_data(run))
    assert view is not None
    assert [diff.state for diff in view.diffs] == ["broken", "wrong", "fixed"]
    assert [(label, count) for _, label, count in view.filters] == [
        ("All", 3),
        ("Wrong now", 2),
        ("Right now", 1),
        ("Fixed", 1),
        ("Broken", 1),
    ]
    assert view.chips == [("exact_match", 2)], "without fields, a chip per metric"


def test_marks_are_against_the_expected_answer(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    first = build_sample_diffs(load_report_data(run))[0]
    assert (first.before, first.after, first.expected) == (
        ["the sum is ", "five"],
        ["the sum is 5"],
        ["the sum is 5"],
    )
    samples = (fake_runs.make_pair(1, "a b", "a c"),)
    record = fake_runs.make_record(samples=samples)
    free = fake_runs.write_run(tmp_path / "free", record=record)
    (diff,) = build_sample_diffs(load_report_data(free))
    assert (diff.before, diff.after, diff.expected) == (["a ", "b"], ["a ", "c"], [])


# ---------------------------------------------------------------- safety


def write_hostile_run(path: Path) -> Path:
    fields = json.dumps({HOSTILE: HOSTILE, "b": [HOSTILE]})
    samples = (
        fake_runs.make_pair(1, HOSTILE, HOSTILE + "x" * 50_000, HOSTILE),
        fake_runs.make_pair(2, json.dumps({HOSTILE: 1, "__proto__": HOSTILE}), fields, fields),
        (replace(fake_runs.SAMPLES[0][0], context=HOSTILE, prompt="</details>"),) * 2,
        (GenerationSample(0, HOSTILE, HOSTILE, "a"),) * 2,
    )
    errors = ErrorAnalysis(
        metric=HOSTILE,
        is_binary=True,
        n=9,
        right=1,
        right_before=0,
        fixed=1,
        broken=0,
        mean=0.1,
        low=0.0,
        high=0.4,
        mean_before=0.0,
        tables=tuple(
            ErrorTable(by, (ErrorGroup(HOSTILE, 9, 8, 0.9, 0.5, 1.0, rows=(HOSTILE,)),))
            for by in ("field", "task", HOSTILE)
        ),
        confusions=(Confusion(HOSTILE, HOSTILE, HOSTILE, 3),),
        shortcuts=(Shortcut(HOSTILE, HOSTILE, 9, 9, 4, 0.001, rows=(HOSTILE,)),),
    )
    verdict = RunVerdict(
        "harmful", HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), (NextStep(HOSTILE, HOSTILE),)
    )
    finding = replace(
        fake_runs.FINDING, message=HOSTILE, rows=(HOSTILE,), check=HOSTILE, fix=HOSTILE
    )
    report = replace(
        fake_runs.REPORT, path=HOSTILE, format=HOSTILE, findings=(finding,), dropped={HOSTILE: 1}
    )
    template = PlanValue(HOSTILE, "rule", HOSTILE, "Hu 2021", "published", "the same")
    plan = replace(
        fake_runs.PLAN.with_settings(chat_template=template),
        data={"data": report, HOSTILE: report},
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
    record = fake_runs.make_record(
        plan,
        comparisons=(comparison,),
        samples=samples,
        input_changes=(HOSTILE,),
        errors=errors,
        verdict=verdict,
    )
    return fake_runs.write_run(path, plan=plan, record=record, events=events)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    html = render_page(load_report_data(write_hostile_run(tmp_path / "run")))
    page = parse_page(html)
    assert page.tags.count("script") == 2  # the data of the answers, and page.js
    assert "img" not in page.tags
    assert not re.search("[\x00\u202e\ud800]", html)
    assert "U+202E" in html


def test_the_policy_forbids_loading_and_allows_our_script_only(tmp_path: Path) -> None:
    run = fake_runs.write_run(tmp_path / "run", record=fake_runs.make_record())
    html = render_page(load_report_data(run))
    assert not re.findall(r"https?:|@import|url\(|<link|<iframe|<img", html)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    assert "unsafe" not in policy[1]
    assert policy[1].count("sha256-") == 2


# ---------------------------------------------------------------- the verb


def test_the_page_is_written_into_the_run_or_elsewhere(tmp_path: Path) -> None:
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
