"""A tokenizer in a process of its own: threads, many cores, how it starts, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import Split

from processor_time import check_seconds
from toy_chat import write_model_folder
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import Json
from tunesmith.data import guarded_process
from tunesmith.data.tokenizer import guarded_tokenizer
from tunesmith.data.tokenizer.guarded_tokenizer import (
    COMMON_PATTERNS,
    GuardedTokenizer,
    list_unknown_patterns,
)

UNSEEN = r"\S+\n?|\s+"
SLOW = r"q+(?=y)"  # quadratic


def make_data(folder: Path, pattern: str = UNSEEN) -> Json:
    """Return a tokenizer.json whose pattern no known tokenizer has."""
    data = json.loads((write_model_folder(folder) / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = [split | {"invert": False}, byte_level | {"trim_offsets": True}]
    return data | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize("pattern", sorted(COMMON_PATTERNS))
def test_a_pattern_that_runs_in_the_process_itself_is_linear(pattern: str) -> None:
    """A quadratic one takes over a second on some text."""
    splitter = Split(Regex(pattern), "isolated")
    for unit in ("x", "X", "xX", " ", "\n", " \n", "1", ".", " .", "'s", "\u0301", "中"):
        for tail in ("x", "\n"):
            text = unit * (20_000 // len(unit)) + tail
            check_seconds(lambda text=text: splitter.pre_tokenize_str(text), limit=0.5)


DEEPSEEK_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"
    "\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [DEEPSEEK_V3_WORDS, QWEN3_5, CL100K])
def test_well_known_patterns_need_no_process(pattern: str) -> None:
    assert not list_unknown_patterns({"type": "Split", "pattern": {"Regex": pattern}})


@pytest.mark.parametrize("pattern", [r"\s+$", QWEN3_5 + "+", CL100K.lower()])
def test_patterns_beside_them_do(pattern: str) -> None:
    assert list_unknown_patterns({"type": "Split", "pattern": {"Regex": pattern}}) == [pattern]


# ---------------------------------------------------------------- threads


def test_two_threads_get_the_ids_of_their_texts(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    single = Tokenizer.from_str(json.dumps(data))
    guarded = GuardedTokenizer(data)
    texts = [[f"{name} {number * 7919}\n" * 3 for number in range(400)] for name in ("aaa", "b")]

    def encode_all(thread_texts: list[str]) -> list[list[int]]:
        return [guarded.encode(text).ids for text in thread_texts]

    with ThreadPoolExecutor(2) as pool:
        ids = list(pool.map(encode_all, texts))
    assert ids == [[single.encode(text).ids for text in part] for part in texts]


def test_a_refusal_reaches_every_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = GuardedTokenizer(make_data(tmp_path, SLOW))
    monkeypatch.setattr(guarded_tokenizer, "MAX_SECONDS", 0.2)

    def encode(text: str) -> str:
        with pytest.raises(InputError) as refusal:
            guarded.encode(text)
        return refusal.value.message

    with ThreadPoolExecutor(3) as pool:
        messages = set(pool.map(encode, ["q" * 200_000] * 6))
    assert len(messages) == 1
    assert "takes over 0.2 seconds" in messages.pop()


# ---------------------------------------------------------------- machines


def test_a_machine_with_many_cores_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "256")
    guarded = GuardedTokenizer(make_data(tmp_path))
    texts = [f"text {number}" for number in range(300)]
    assert len(guarded.encode_batch_fast(texts)) == 300


@pytest.mark.parametrize(
    ("app", "problem"),
    [
        ("", "Permission|No such file"),
        ("/nowhere/python", "No such file"),
        ("#!/bin/sh\necho usage: app VERB >&2\nexit 2\n", "usage: app VERB"),
        ("#!/bin/sh\necho broken >&2\necho starting\ncat > /dev/null\n", "broken"),
    ],
)
def test_an_interpreter_that_does_not_start_is_a_problem_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: str, problem: str
) -> None:
    executable = app
    if app.startswith("#!"):
        executable = str(tmp_path / "app")
        Path(executable).write_text(app)
        Path(executable).chmod(0o755)
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(MachineError, match=problem) as refusal:
        GuardedTokenizer(make_data(tmp_path))
    assert "regular expression" not in str(refusal.value)
    assert refusal.value.fix


def test_the_library_is_that_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpreter without site packages, as where only PYTHONPATH names them."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    assert GuardedTokenizer(make_data(tmp_path)).encode("some text").ids


@pytest.mark.promise
def test_starting_and_loading_are_no_part_of_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 1.5\nexec "{sys.executable}" "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(guarded_tokenizer, "MAX_SECONDS", 1.0)
    assert GuardedTokenizer(make_data(tmp_path)).encode("some text").ids


@pytest.mark.promise
def test_a_large_file_has_longer_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial of the patterns keeps its limit."""
    data = make_data(tmp_path)
    start = len(data["model"]["vocab"])
    data["model"]["vocab"] |= {f"token{number:x}": start + number for number in range(400_000)}
    monkeypatch.setattr(guarded_tokenizer, "MAX_SECONDS", 0.2)
    assert GuardedTokenizer(data).encode("some text").ids


def test_a_process_that_waits_for_a_processor_is_not_too_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, it takes no processor time: as on a machine that runs other programs."""
    guarded = GuardedTokenizer(make_data(tmp_path))
    monkeypatch.setattr(guarded_tokenizer, "MAX_SECONDS", 0.2)
    os.kill(guarded._child.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(guarded.encode, "some text")
        time.sleep(0.5)
        os.kill(guarded._child.pid, signal.SIGCONT)
        assert encoding.result().ids


def test_a_process_that_gets_no_processor_is_the_fault_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = GuardedTokenizer(make_data(tmp_path))
    monkeypatch.setattr(guarded_tokenizer, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(guarded_process, "MAX_WAIT_SECONDS", 0.1)
    os.kill(guarded._child.pid, signal.SIGSTOP)
    with pytest.raises(MachineError, match="got too little time"):
        guarded.encode("some text")


@pytest.mark.promise
def test_a_slow_pattern_is_refused_when_it_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_tokenizer, "MAX_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"takes over 0\.1 seconds when it is tried"):
        GuardedTokenizer(make_data(tmp_path, r"(x+){2}[yz]"))


# ---------------------------------------------------------------- the end


@pytest.mark.promise
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_process_without_its_parent_ends(tmp_path: Path) -> None:
    """The parent is killed while a pattern runs: nobody is there to end the process."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(make_data(tmp_path, SLOW)))
    script = tmp_path / "parent.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from tunesmith.data.tokenizer import guarded_tokenizer\n"
        "guarded_tokenizer.MAX_SECONDS = 6.0\n"  # in which this process may be late
        "data = json.loads(Path(sys.argv[1]).read_text())\n"
        "guarded = guarded_tokenizer.GuardedTokenizer(data)\n"
        "print(guarded._child.pid, flush=True)\n"
        "guarded.encode('q' * 200_000)\n"
    )
    with subprocess.Popen([sys.executable, str(script), str(data)], stdout=subprocess.PIPE) as done:
        assert done.stdout is not None
        pid = int(done.stdout.readline())
        encoder = psutil.Process(pid)
        started = encoder.cpu_times().user
        while encoder.cpu_times().user < started + 0.2:  # then the pattern runs
            time.sleep(0.01)
        done.kill()
    assert is_alive(pid)
    deadline = time.monotonic() + 300
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    if was_alive := is_alive(pid):
        os.kill(pid, 9)
    assert not was_alive
