"""The command line: arguments in, exit codes and streams out.

What the verbs compute is tested with their packages."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Group
from typer.main import get_command

from tiny_runs import build_sum_rows, write_rows
from tunesmith import __version__
from tunesmith.cli import app
from tunesmith.cli.args import OLD_FLAGS, OLD_VERBS
from tunesmith.core.errors import GateError, InputError, Interrupted, MachineError, TunesmithError
from tunesmith.recipe.load import load_recipe

CliResult = tuple[int, str, str]  # exit code, stdout, stderr


def failing(error: BaseException) -> Callable[..., None]:
    def verb(as_json: app.AsJson = False) -> None:
        assert isinstance(as_json, bool)
        raise error

    return verb


def test_every_verb_is_in_the_help_with_json(tunesmith: Callable[..., CliResult]) -> None:
    _, out, _ = tunesmith("--help")
    for name in app.VERBS:
        assert name.split()[0] in out
        code, out_of_verb, _ = tunesmith(*name.split(), "--help")
        assert code == 0
        assert ("--json" in out_of_verb) == (name != "serve")  # which has no result


# Private idiom: words that the field does not use, or that say nothing.
BANNED_WORDS = (
    *("found", "told", "known", "said", "kept", "left", "own", "asked", "whole", "place", "given"),
    *("beside", "stands", "stand", "goes on", "go on", "whose", "a token", "gather"),
)
MAX_HELP_CHARS = 60
LIBRARY_OPTIONS = ("help", "install_completion", "show_completion")
MAX_HELP_WORDS = 12
LIMIT_SECONDS = 300  # of a hang


def collect_help_lines() -> dict[str, str]:
    """Return the help text of every verb, group, argument and option."""
    lines: dict[str, str] = {}

    def collect(command: Any, name: str) -> None:
        lines[name] = command.help or ""
        for parameter in command.params:
            if parameter.name not in LIBRARY_OPTIONS:
                lines[f"{name} {parameter.name}"] = parameter.help or ""
        for child_name, child in getattr(command, "commands", {}).items():
            collect(child, f"{name} {child_name}")

    collect(get_command(app.build_app()), "tunesmith")
    return lines


def test_every_help_text_is_one_short_line_of_plain_words() -> None:
    lines = collect_help_lines()
    assert len(lines) > 80
    for name, text in lines.items():
        assert text, f"{name} has no help"
        assert "\n" not in text.strip(), f"{name}: {text}"
        assert len(text.strip()) <= MAX_HELP_CHARS, f"{name}: {text}"
        assert len(text.split()) <= MAX_HELP_WORDS, f"{name}: {text}"
        for word in BANNED_WORDS:
            assert not re.search(rf"\b{word}\b", text, re.IGNORECASE), f"{name}: {text}"


@pytest.mark.parametrize("flag", OLD_FLAGS)
def test_a_former_flag_is_refused_with_its_new_name(
    tunesmith: Callable[..., CliResult], flag: str
) -> None:
    verb, _, name = flag.rpartition(" ")  # of one verb, or of all
    snake = "--" + name.strip("-").replace("-", "_")
    for words in ([verb or "plan", "r.yaml", name], [verb or "resume", "runs/x", f"{snake}=1"]):
        code, out, err = tunesmith(*words)
        assert (code, out) == (2, "")
        assert err == (
            f"error: command line: {name} is no longer a flag\n  fix: {OLD_FLAGS[flag]}\n"
        )


def test_former_flags_lead_to_flags_that_exist(tunesmith: Callable[..., CliResult]) -> None:
    verbs = ("data curate", "plan", "resume")
    helps = "".join(tunesmith(*verb.split(), "--help")[1] for verb in verbs)
    for fix in OLD_FLAGS.values():
        replacement = fix.split()[1]
        if replacement.startswith("--"):
            assert replacement in helps
        elif verb := re.search(r"`tunesmith (\w+)", fix):
            assert verb[1] in app.VERBS
        elif "/" in replacement:
            assert (Path(__file__).parents[3] / replacement).exists()


@pytest.mark.parametrize("words", OLD_VERBS)
def test_a_former_verb_is_refused_with_its_new_name(
    tunesmith: Callable[..., CliResult], words: tuple[str, str]
) -> None:
    code, _, err = tunesmith(*words, "r.yaml", "--tool", "argilla")
    assert code == 2
    assert f"fix: use `{OLD_VERBS[words]}`" in err
    assert OLD_VERBS[words].removeprefix("tunesmith ") in app.VERBS


def test_without_a_verb_the_help_is_shown(tunesmith: Callable[..., CliResult]) -> None:
    assert tunesmith() == tunesmith("--help")
    assert tunesmith("--version") == (0, f"tunesmith {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["plan", "--model", "x", "--max-steps"], "--max-steps"),
        (["plan", "--learning-rate", "--seed", "3"], "--learning-rate"),
        (["advise", "--examples", "--private"], "--examples"),
    ],
    ids=["last", "before a flag", "fact"],
)
def test_a_flag_without_its_value_is_refused(
    tunesmith: Callable[..., CliResult], words: list[str], flag: str
) -> None:
    code, _, err = tunesmith(*words)
    assert code == 2
    assert f"{flag} has no value" in err


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--compare", "--why", "lora_r"], "--compare and --why"),
        (["--compare", "--benchmark"], "--compare and --benchmark"),
    ],
)
def test_a_plan_has_one_view(
    flags: list[str], names: str, tunesmith: Callable[..., CliResult]
) -> None:
    code, _, err = tunesmith("plan", "--model", "x", "--data", "rows.jsonl", *flags)
    assert (code, f"{names} cannot be combined" in err) == (2, True)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"tunesmith {__version__}")


def test_unknown_verbs_are_the_users_mistake(tunesmith: Callable[..., CliResult]) -> None:
    code, out, err = tunesmith("tran")
    assert (code, out) == (2, "")
    assert "No such command 'tran'" in err


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["r.yaml", "--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning_rate=1e-4", "r.yaml"], "learning_rate", 1e-4),
        (["--lora-rank", "8", "r.yaml", "--max-steps", "3"], "lora_r", 8),
        (["r.yaml", "--use-rslora", "--seed", "4"], "use_rslora", True),
        (
            ["r.yaml", "--lora-target-modules", "[q_proj, v_proj]"],
            "lora_target_modules",
            ("q_proj", "v_proj"),
        ),
        (["r.yaml", "--model", "a=b"], "model", "a=b"),
        (["--model", "x", "--data", "y.jsonl"], "model", "x"),
    ],
)
def test_flags_override_the_file(
    words: list[str], key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("model: tiny\ndata: a.jsonl\nlearning_rate: 1\nlora_r: 1\n")
    assert getattr(app.parse_recipe_args(words), key) == value


def test_two_recipes_are_one_too_many() -> None:
    with pytest.raises(InputError, match=r"two recipe files, a\.yaml and b\.yaml"):
        app.parse_recipe_args(["a.yaml", "b.yaml"])


@pytest.mark.parametrize("second", ["--data", "--data=b.jsonl", "--lora-r=3", "--lora_r"])
def test_a_repeated_flag_is_refused(second: str) -> None:
    with pytest.raises(InputError, match=f"{second.partition('=')[0]} is repeated") as caught:
        app.parse_recipe_args(["--data", "a.jsonl", "--lora_r", "2", second, "4"])
    assert "[a, b]" in caught.value.fix


def test_a_typo_in_a_flag_is_refused_with_the_nearest_key(
    tunesmith: Callable[..., CliResult], tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: tiny\ndata: a.jsonl\n")
    code, out, err = tunesmith("plan", str(path), "--learning-rat", "1")
    assert (code, out) == (2, "")
    assert (
        err == "error: command line: unknown key '--learning-rat'; did you mean 'learning_rate'?\n"
    )


@pytest.mark.parametrize(
    "error", [TunesmithError, InputError, MachineError, GateError, Interrupted]
)
def test_each_refusal_has_its_exit_code_and_json(
    error: type[TunesmithError],
    tunesmith: Callable[..., CliResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        app.VERBS, "fail", failing(error("no such thing", where="a.yaml:3", fix="make one"))
    )
    text = "error: a.yaml:3: no such thing\n  fix: make one\n"
    assert tunesmith("fail") == (error.exit_code, "", text)
    code, out, err = tunesmith("fail", "--json")
    assert (code, err) == (error.exit_code, text)
    assert json.loads(out) == {
        "tunesmith": __version__,
        "error": {
            "kind": error.__name__,
            "message": "no such thing",
            "where": "a.yaml:3",
            "fix": "make one",
            "exit_code": error.exit_code,
        },
    }


def test_ctrl_c_exits_with_130(
    tunesmith: Callable[..., CliResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(app.VERBS, "fail", failing(KeyboardInterrupt()))
    assert tunesmith("fail")[0] == 130


INTERRUPTED = """\
import os, signal, sys, threading, time, weakref
from tunesmith.cli import app

class Worker: ...

def verb(as_json: app.AsJson = False) -> None:
    worker = Worker()
    weakref.finalize(worker, print, "worker ended")
    globals()["kept"] = worker
    threading.Thread(target=time.sleep, args=(1000,)).start()
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(1000)
    finally:
        print("unwound")

app.VERBS["wait"] = verb
sys.argv = ["tunesmith", "wait"]
app.main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_unwinds_and_waits_for_nothing(name: str, code: int) -> None:
    """Temporary files and processes go; threads and the interpreter's end are not waited for."""
    program = INTERRUPTED.format(name=name)
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout == "unwound\nworker ended\n"


LATE = """
import os, signal, sys

def send(frame, event, _):
    caller = frame.f_back.f_code.co_name if frame.f_back else ""
    if event == "call" and (frame.f_code.co_name, caller) == {place}:
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGINT)

from tunesmith.cli import app
sys.argv = ["tunesmith", "no-such-verb"]
sys.setprofile(send)
app.main()
"""


@pytest.mark.parametrize(
    ("place", "code"),
    [(("exit_with_error", "_run_verb"), 130), (("__exit__", "main"), 2)],
    ids=["while the error is printed", "at the end of a verb"],
)
def test_a_signal_at_the_end_leaves_no_traceback(place: tuple[str, str], code: int) -> None:
    program = LATE.format(place=place)
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_the_signals_of_the_caller_come_back(
    tunesmith: Callable[..., CliResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setitem(app.VERBS, "fail", failing(KeyboardInterrupt()))
    tunesmith("fail")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_bug_says_so_with_its_traceback() -> None:
    program = (
        "from tunesmith.cli import app as cli\n"
        "def broken(as_json: cli.AsJson = False) -> None: raise ZeroDivisionError('seven')\n"
        "cli.VERBS['broken'] = broken\n"
        "cli.main(['broken'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "ZeroDivisionError: seven\nthis is a bug in tunesmith" in done.stderr


def test_init_writes_a_recipe_that_loads(
    tunesmith: Callable[..., CliResult], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "recipe.yaml"
    code, out, _ = tunesmith(
        "init", str(path), "--model", "org/base", "--data", "my.jsonl", "--json"
    )
    assert code == 0
    assert json.loads(out) == {
        "tunesmith": __version__,
        "recipe": str(path),
        "schema": str(path.parent / "recipe.schema.json"),
        "tool": "",
        "reason": "",
        "untranslated": [],
    }
    recipe = load_recipe(path)
    assert (recipe.model, recipe.data[0].path) == ("org/base", path.parent / "my.jsonl")
    before = path.read_text()
    code, _, err = tunesmith("init", str(path))
    assert code == 2
    assert "the file already exists" in err
    assert path.read_text() == before


def test_the_schema_is_printed_in_full(tunesmith: Callable[..., CliResult]) -> None:
    plain = json.loads(tunesmith("schema")[1])
    assert plain["properties"]["learning_rate"]["description"] == "Peak learning rate."
    assert json.loads(tunesmith("schema", "--json")[1]) == {
        "tunesmith": __version__,
        "schema": plain,
    }


def test_other_verbs_refuse_options_they_do_not_know(tunesmith: Callable[..., CliResult]) -> None:
    code, out, err = tunesmith("schema", "--frobnicate")
    assert (code, out) == (2, "")
    assert "--frobnicate" in err


def test_text_of_data_and_models_is_printed_as_it_is(
    tunesmith: Callable[..., CliResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verb(as_json: app.AsJson = False) -> None:
        app.print_result(
            {"answer": "[red]x[/]"}, "[red]x[/] [/]", Group("[red]ours[/]"), as_json=as_json
        )

    monkeypatch.setitem(app.VERBS, "echo", verb)
    assert tunesmith("echo") == (0, "[red]x[/] [/]\nours\n", "")
    assert json.loads(tunesmith("echo", "--json")[1]) == {
        "tunesmith": __version__,
        "answer": "[red]x[/]",
    }


# ---------------------------------------------------------------- verbs on a tiny model


def test_a_plan_is_one_object_with_every_reason(
    tunesmith: Callable[..., CliResult], tiny_folder: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "train.jsonl", build_sum_rows(1, 6))
    words = ("plan", "--model", str(tiny_folder), "--data", str(data), "--lora-rank", "3")
    code, out, _ = tunesmith(*words, "--json")
    plan = json.loads(out)
    assert (code, plan["tunesmith"], plan["steps"]) == (0, __version__, 5)
    assert plan["settings"]["lora_r"] == {
        "value": 3,
        "decided_by": "user",
        "reason": "set in the recipe",
        "source": "",
        "confidence": "",
        "common_advice": plan["settings"]["lora_r"]["common_advice"],
    }
    assert plan["settings"]["learning_rate"]["source"]
    assert plan["memory_bytes"]["peak"] > 0
    code, out, _ = tunesmith(*words)
    assert code == 0
    assert "learning_rate" in out
    code, out, _ = tunesmith(*words, "--why", "lora_r")
    assert (code, "set in the recipe" in out) == (0, True)
    methods = json.loads(tunesmith(*words, "--compare", "--target", "rtx4090", "--json")[1])[
        "methods"
    ]
    assert [method["method"] for method in methods] == ["full", "lora", "qlora"]
    assert {method["free_bytes"] for method in methods} == {24 * 10**9}
    assert all(method["seconds"][0] < method["seconds"][1] for method in methods)
    code, out, _ = tunesmith(*words, "--memory", "1MB")
    assert (
        code,
        "does not fit: the smallest GPU that fits is l4" in " ".join(out.split()),
    ) == (0, True)
    for wrong in (
        ["--memory", "lots"],
        ["--target", "abacus"],
        ["--why", "lora_z"],
        ["--compare", "--why", "lora_r"],
    ):
        assert tunesmith(*words, *wrong)[0] == 2


@pytest.mark.promise
def test_rates_are_tried(
    tunesmith: Callable[..., CliResult], tiny_folder: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "train.jsonl", build_sum_rows(1, 40))
    words = [
        "tune",
        "lr",
        "--model",
        str(tiny_folder),
        "--data",
        str(data),
        "--dtype",
        "fp32",
        "--steps",
        "10",
    ]
    code, out, err = tunesmith(*words, "--eval-split", "0.3")
    assert (code, "before training: held-out loss" in err, err.count("rate ") >= 2) == (
        0,
        True,
        True,
    ), err
    assert "95% CI" in " ".join(out.split())
    code, _, err = tunesmith(*words)
    assert (code, "no held-out rows" in err) == (2, True)


@pytest.mark.promise
def test_a_run_from_words_to_answers(
    tunesmith: Callable[..., CliResult],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, run = write_rows(tmp_path / "train.jsonl", build_sum_rows(1, 6)), str(tmp_path / "run")
    test = write_rows(tmp_path / "test.jsonl", build_sum_rows(50, 2))
    words = [
        "train",
        "--model",
        str(tiny_folder),
        "--data",
        str(data),
        "--test-data",
        str(test),
        "--max-steps",
        "2",
    ]
    code, out, err = tunesmith(*words, "--dtype", "fp32", "--output-dir", run, "--json")
    assert code == 0, out + err
    record = json.loads(out)
    assert (record["tunesmith"], record["steps"]) == (__version__, 2)
    code, out, _ = tunesmith("eval", run, "--json")
    assert [c["metric"] for c in json.loads(out)["comparisons"]] == [
        c["metric"] for c in record["comparisons"]
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("3 and 9\n"))
    code, out, _ = tunesmith("chat", run, "--json")
    assert code == 0
    assert json.loads(out).keys() == {"tunesmith", "answer"}
    code, out, _ = tunesmith("resume", run, "--json")
    assert (code, json.loads(out)["error"]["message"]) == (2, "this run is finished")


@pytest.mark.parametrize(
    ("words", "where", "message"),
    [
        (
            ["plan", "--attention", "flash"],
            "command line",
            "--attention: expected 'auto' or 'cpu_kernel'",
        ),
        (
            ["plan", "--data", "[{path: t.jsonl, format: alpaka}]"],
            "command line",
            "--data[0].format: expected 'auto'",
        ),
        (["data", "check", "--eval-data", "one.jsonl"], "eval_data: ", "one row"),
        (["plan", "--data", "none.jsonl"], "none.jsonl", "no such file"),
        (["plan", "--model", "smolm2-135m-instruct"], "model", "there is no model"),
        (["resume", "nowhere"], "nowhere", "no such run folder"),
        (["chat", "nowhere"], "nowhere", "no such run folder"),
    ],
)
def test_refusals_are_objects_too(
    words: list[str],
    where: str,
    message: str,
    tunesmith: Callable[..., CliResult],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "t.jsonl", build_sum_rows(1, 6))
    write_rows(tmp_path / "one.jsonl", build_sum_rows(50, 1))
    defaults = {"--model": str(tiny_folder), "--data": "t.jsonl", "--test-data": "t2.jsonl"}
    write_rows(tmp_path / "t2.jsonl", build_sum_rows(70, 2))
    if words[0] in ("plan", "data"):
        for flag, value in defaults.items():
            words = words if flag in words else [*words, flag, value]
    code, out, err = tunesmith(*words, "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"]) == (2, 2)
    assert where in error["where"]
    assert message in error["message"]
    assert err.startswith("error: ")


def test_a_check_of_rows_ends_as_a_run_would(
    tunesmith: Callable[..., CliResult], tiny_folder: Path, tmp_path: Path
) -> None:
    rows = str(write_rows(tmp_path / "t.jsonl", build_sum_rows(1, 6)))
    words = ("data", "check", "--model", str(tiny_folder), "--data", rows)
    assert tunesmith(*words)[0] == 0
    assert tunesmith(*words, "--max-length", "3")[0] == 2, "all rows would be dropped"
    code, _, err = tunesmith("data", "check", rows)
    assert code == 2
    assert f"pass a data file with --data {rows}" in err


@pytest.mark.parametrize("words", [["schema"], ["--version"]], ids=str)
def test_a_reader_that_leaves_is_no_bug(words: list[str]) -> None:
    """As `head` does. Exit code 1 is that of a bug."""
    command = [sys.executable, "-m", "tunesmith", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(LIMIT_SECONDS) == 141


@pytest.mark.parametrize("words", [["no-such-verb"], ["plan", "none.yaml", "--json"]], ids=str)
def test_an_error_that_nobody_reads_keeps_its_code(words: list[str]) -> None:
    command = [sys.executable, "-m", "tunesmith", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(LIMIT_SECONDS) == 2


def test_a_check_of_a_table_that_a_run_refuses_ends_with_2(
    tunesmith: Callable[..., CliResult], tiny_folder: Path, tmp_path: Path
) -> None:
    lines = [
        "text,label,source",
        *(f"so it was {i},{'good' if i % 2 else 'bad'},x" for i in range(9)),
    ]
    table = tmp_path / "rows.csv"
    table.write_text("\n".join(lines))
    words = ("--model", str(tiny_folder), "--data", str(table), "--skip-invalid")
    assert tunesmith("plan", *words)[0] == 2
    assert tunesmith("data", "check", *words)[0] == 2
    table.write_text("\n".join(line.rpartition(",")[0] for line in lines))
    assert tunesmith("data", "check", *words)[0] == 0
