"""Each file of a run folder, damaged in each way, is the user's error or no matter, and no bug."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from damages import DAMAGES
from fake_runs import make_record, write_run
from tunesmith.core.events import GenerationSample
from tunesmith.core.json_io import to_jsonable
from tunesmith.evaluate.results import EvalResults, MetricValues

SAMPLE = GenerationSample(0, "row:1", "a question", "an answer", "expected")
RESULTS = EvalResults((MetricValues("test", "exact_match", ("row:1",), (1.0,)),), (SAMPLE,))
FILES = (
    "plan.json",
    "record.json",
    "events.jsonl",
    "fingerprint.json",
    "recipe.yaml",
    "eval_before.json",
    "eval_after.json",
    "rollbacks.json",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = to_jsonable(RESULTS)
    files = {
        "eval_before.json": results,
        "eval_after.json": results,
        "rollbacks.json": {"rollbacks": []},
    }
    path = tmp_path_factory.mktemp("runs") / "run"
    return write_run(path, record=make_record(), files=files)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_nothing_is_a_bug(
    name: str,
    damage: str,
    run: Path,
    tmp_path: Path,
    tunesmith: Callable[..., tuple[int, str, str]],
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    DAMAGES[damage](copy / name)
    for words in (("report",), ("compare", "base"), ("eval",), ("chat",), ("resume",)):
        code, _, err = tunesmith(*words, str(copy))
        assert code in (0, 2), (words, err)
        assert "Traceback" not in err
        if code == 2:
            assert "fix: " in err, (words, err)
            assert name in err or words[0] != "report", err
    code, out, _ = tunesmith("runs", str(tmp_path), "--json")
    assert code == 0
    assert len(json.loads(out)["runs"]) == int(name != "plan.json" or (copy / name).is_file())
