"""The page of a sweep and its view in the terminal: from a record alone; nothing in it runs."""

import dataclasses
import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith import api
from tunesmith.advise.sweep.summary import MeasuredTrials, build_configurations, list_effects
from tunesmith.cli.views.sweep import render_sweep, report_sweep
from tunesmith.core.errors import InputError
from tunesmith.core.events import Score, TrainingEnd
from tunesmith.core.json_io import dump_json
from tunesmith.core.sweep_record import (
    SWEEP_FILE,
    SWEEP_FORMAT,
    SweepRecord,
    TrialEnd,
    TrialRecord,
    TrialSpec,
    TrialStart,
)
from tunesmith.core.types import __version__
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.recipe.sweep import SweepConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
RATES = (3e-4, 1e-3, 3e-3)
RANKS = (8, 64)
HOSTILE = "<script>alert(1)</script>\u202e"


def make_values(loss: float, task: str = "eval") -> MetricValues:
    """Return twelve items around a loss, each with its own level."""
    values = tuple(loss + 0.1 * (item % 5) + 0.01 * (item % 3) for item in range(12))
    ids = tuple(f"row {item}" for item in range(12))
    return MetricValues(task, "loss", ids, values, higher_is_better=False)


def make_record(reason: str = "median pruner, at 50% of the steps") -> SweepRecord:
    """Return a sweep of six configurations with two seeds, one stopped early and one failed."""
    trials: list[TrialRecord] = []
    values: dict[int, MetricValues] = {}
    for number in range(10):
        configuration = number if number < 6 else number - 6
        rate = RATES[configuration // 2]
        rank = RANKS[configuration % 2]
        loss = {3e-4: 0.9, 1e-3: 0.5, 3e-3: 0.6}[rate] + 0.002 * configuration + 0.01 * (number > 5)
        state = {4: "pruned", 5: "failed"}.get(number, "complete")
        curve = ((25, loss + 0.4), (50, loss + 0.2), (75, loss + 0.1), (100, loss))
        trials.append(
            TrialRecord(
                number=number,
                configuration=configuration,
                seed=int(number > 5),
                settings={"learning_rate": rate, "lora_r": rank},
                state=state,  # type: ignore[arg-type]
                folder=f"trial-{number:03d}",
                value=loss if state == "complete" else None,
                curve=curve[: 2 if number == 4 else 4],
                steps=30 if number == 4 else 60,
                planned_steps=60,
                seconds=61.0,
                reason={4: reason, 5: "no memory"}.get(number, ""),
            )
        )
        if state == "complete":
            values[number] = make_values(loss)
    measured = MeasuredTrials(tuple(trials), values)
    configurations, winner = build_configurations(measured)
    assert winner is not None
    sweep = SweepConfig.model_validate({"learning_rate": RATES, "lora_r": RANKS, "seeds": 2})
    test = compare_measurements(make_values(1.4, "test"), make_values(0.52, "test"), step=60)
    return SweepRecord(
        version=__version__,
        format=SWEEP_FORMAT,
        model="tiny",
        metric="loss",
        higher_is_better=False,
        search="grid",
        pruner="median",
        seeds=(0, 1),
        planned_configurations=6,
        rows=12,
        base_value=compute_score(make_values(1.4)).value,
        trials=tuple(trials),
        configurations=tuple(configurations),
        effects=tuple(list_effects(sweep, measured, winner)),
        winner=winner,
        winner_trial=2,
        test=(test,),
        test_reads=1,
        caveats=("1 trial stopped early",),
        folder="runs/sweep",
    )


def write_sweep(folder: Path, record: SweepRecord) -> Path:
    (folder / SWEEP_FILE).write_bytes(dump_json(record))
    (folder / "winner.yaml").write_text("# the winner\nlearning_rate: 0.001\n")
    return folder


def test_the_page_is_one_file_without_script(tmp_path: Path) -> None:
    path = api.write_report(write_sweep(tmp_path, make_record(reason=HOSTILE)))
    assert path == tmp_path / "sweep.html"
    page = path.read_text()
    assert "default-src &#39;none&#39;; style-src" in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\u202e" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower()


def test_the_page_names_no_folder(tmp_path: Path) -> None:
    """Absolute paths name the user: in the model, the reasons and the recipe."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    record = make_record(reason=f"{folder}/trial-004: stopped")
    write_sweep(folder, dataclasses.replace(record, model="/home/ann/models/tiny"))
    (folder / "winner.yaml").write_text("data:\n- path: /home/ann/it's/rows.jsonl\n")
    page = api.write_report(folder).read_text()
    assert "ann" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert str(tmp_path) not in page
    assert "path: rows.jsonl" in page
    assert "trial-004: stopped" in page


@pytest.mark.parametrize(("losses", "tone"), [((1.4, 0.5), "good"), ((0.5, 1.4), "open")])
def test_the_winner_is_good_if_test_data_shows_it(
    losses: tuple[float, float], tone: str, tmp_path: Path
) -> None:
    before, after = (make_values(loss, "test") for loss in losses)
    test = (compare_measurements(before, after, step=60),)
    record = dataclasses.replace(make_record(), test=test)
    page = api.write_report(write_sweep(tmp_path, record)).read_text()
    assert f'<section id="verdict" class="{tone}"' in page


def test_the_page_has_every_configuration_the_best_first(tmp_path: Path) -> None:
    record = make_record()
    page = api.write_report(write_sweep(tmp_path, record)).read_text()
    table = page.partition('id="configurations"')[2].partition("</section>")[0]
    numbers = [int(number) for number in re.findall(r'class="number">(\d+)</th>', table)]
    assert numbers[0] == record.winner == 2
    assert sorted(numbers) == list(range(6))
    assert numbers[-2:] == [4, 5], "those without a result come last"
    assert "median pruner, at 50% of the steps" in table
    assert "no memory" in table
    assert page.count("<svg") >= 3 + 3, "a chart per key, the curves, and the differences"
    assert "learning_rate: 0.001" in page


def test_levels_are_compared_with_all_else_equal() -> None:
    effects = {(effect.key, effect.level): effect for effect in make_record().effects}
    slow = effects["learning_rate", "0.0003"]
    assert (slow.best_level, slow.pairs, slow.verdict) == ("0.001", 4, "worse")
    assert slow.difference == pytest.approx(0.4 - 0.004)
    fast = effects["learning_rate", "0.003"]
    assert (fast.pairs, fast.difference) == (0, None), "none of its trials reached the end"
    assert fast.verdict == "not compared: 1 of 2 trials stopped early"
    assert ("lora_r", "8") not in effects, "the winner's, though one of its trials stopped early"
    rank = effects["lora_r", "64"]
    assert (rank.best_level, rank.pairs) == ("8", 4)
    assert rank.difference == pytest.approx(0.002)


def test_the_terminal_shows_the_same() -> None:
    record = make_record()
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_sweep(record))
    text = console.export_text()
    lines = text.splitlines()
    header = next(index for index, line in enumerate(lines) if line.lstrip().startswith("no."))
    assert lines[header + 1].split()[:4] == ["2", "0.001", "8", "2"]
    assert "winner" in lines[header + 1]
    assert "failed: no memory" in text
    assert "on test_data, once" in text
    assert "recipe: runs/sweep/winner.yaml" in text


def test_scores_after_training_are_not_printed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are those of the chosen checkpoint, which the end of the trial names."""
    record = dataclasses.replace(make_record(), folder=str(tmp_path))
    write_sweep(tmp_path, record)
    trial = record.trials[0]
    score = Score("eval", "loss", 0.9, 0.8, 1.0, n=12, step=60)
    spec = TrialSpec(trial.number, trial.configuration, trial.seed, trial.settings)
    events = [
        *(TrialStart(spec, 12), dataclasses.replace(score, step=0), score),
        *(TrainingEnd(60, "finished", 1.0), score, TrialEnd(trial, 0, 0.0)),
        record,
    ]
    assert report_sweep(events) == record
    assert capsys.readouterr().err.splitlines() == [
        "trial-000, 1 of at most 12: learning_rate 0.0003, lora_r 8, seed 0",
        "  step 60: eval loss 0.9000",
        "  trial-000 complete: 0.9000 on eval_data, 60 of 60 steps",
        f"report: {tmp_path / 'sweep.html'}",
    ]


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    write_sweep(tmp_path, dataclasses.replace(make_record(), format=7))
    with pytest.raises(InputError, match="sweep format 7 is not supported"):
        api.write_report(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(width: int, tmp_path: Path) -> None:
    """One request, nothing in the console, accessible, and no wider than the window."""
    playwright = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    file = api.write_report(write_sweep(tmp_path, make_record(reason=HOSTILE)))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(
            viewport={"width": width, "height": 900}, bypass_csp=True
        ).new_page()
        requests: list[str] = []
        messages: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.goto(file.as_uri())
        assert requests == [file.as_uri()]
        assert messages == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        results = axe.Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
        browser.close()
