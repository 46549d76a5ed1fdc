"""Interrupt verbs and measure how long each takes to end.

    python -m benchmarks.interrupts tiny|real|hostile [VERB ...]

It prints a table of docs/results/faults.md.

Each verb runs as a process in a folder of its own, and gets SIGINT or SIGTERM after each delay,
unless it has ended before. Expected: it ends within a second (training with the step it is in) and
with 130 or 143, prints no traceback, leaves no process, no temporary file, and no file that is
half-written. Processor time is that of the process after the signal; on a busy machine the wall
time is many times longer. `hostile` reads files that cost as much as a stranger's may; there the
signal comes after so much processor time of the verb, so that it meets the reading on any machine.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from safetensors import SafetensorError, safe_open

from tunesmith.core.types import Json

DELAYS = (0.15, 0.3, 0.6, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 25)
MANY_ROWS = 20_000
VERBS = {
    "plan": "plan recipe.yaml",
    "data check": "data check many.yaml",
    "data curate": "data curate --keep 200 --out chosen many.yaml",
    "train": "train recipe.yaml --output-dir new",
    "resume": "resume begun",
    "eval": "eval run --data train.jsonl",
    "advise": "advise recipe.yaml --measure --minutes 3",
    "report": "report run",
    "export merged": "export run --to merged",
    "export gguf": "export run --to gguf",
}
CPU_DELAYS = (0.6, 0.9, 1.2, 1.6, 2.2)
HOSTILE_VERBS = {
    "a tokenizer of a cubic pattern": "data check --model cubic --data train.jsonl",
    "a tokenizer of 262,144 tokens": "data check --model large --data train.jsonl",
    "30,000 tensors": "plan tensors.yaml",
    "a row of 3 MB": "data check --model model --data long.jsonl",
    "a row of 1,000 messages": "data curate --keep 1 --out chosen messages.yaml",
    "a recipe of 4,900 unknown keys": "train hostile.yaml --output-dir new",
}
RECIPE = """\
model: {model}
data: train.jsonl
eval_data: eval.jsonl
test_data: test.jsonl
batch_size: 4
max_steps: 6
num_train_epochs: 6
metrics: [exact_match, token_f1]
output_dir: run
"""


@dataclass(frozen=True)
class Outcome:
    """How a verb ended after a signal: wall and processor seconds, exit code, what is wrong."""

    delay: float
    number: signal.Signals
    seconds: float
    cpu_seconds: float
    exit_code: int
    problems: tuple[str, ...]
    output: str


# ---------------------------------------------------------------- inputs


def write_inputs(folder: Path, model: str) -> None:
    """Write the rows and recipes of all verbs, and train the run that eval and export read."""
    words = sorted(
        {
            word
            for path in Path(os.__file__).parent.glob("*.py")
            for word in path.read_text("utf-8").split()
            if word.isalpha()
        }
    )
    rng = random.Random(0)
    for name, count in (("train", 40), ("eval", 10), ("test", 10), ("many", MANY_ROWS)):
        lines = (json.dumps(build_row(rng, words)) + "\n" for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    recipe = RECIPE.format(model=model)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "many.yaml").write_text(recipe.replace("data: train", "data: many", 1))
    start = [sys.executable, "-m", "tunesmith", "train", "recipe.yaml"]
    subprocess.run(start, cwd=folder, check=True, capture_output=True)
    begun = [*start, "--output-dir=begun", "--save-steps=1"]
    with subprocess.Popen(begun, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while "saved checkpoints/step-1" not in process.stderr.readline():
            pass
        process.kill()


def write_hostile_inputs(folder: Path) -> None:
    """Write the files that HOSTILE_VERBS read; each is accepted, or refused after some time."""
    regex = {"Regex": r"[\s\S]+?[\s\S]+?(?<![\s\S])"}
    cubic = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    change_tokenizer(folder, "cubic", {"pre_tokenizer": cubic}, {})
    change_tokenizer(folder, "large", {}, {f"token{i}": 1000 + i for i in range(262_144)})
    shutil.copytree(folder / "model", folder / "tensors")
    tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": tensor for i in range(30_000)}).encode()
    content = len(header).to_bytes(8, "little") + header
    (folder / "tensors/model.safetensors").write_bytes(content)
    recipe = RECIPE.format(model="model")
    (folder / "tensors.yaml").write_text(RECIPE.format(model="tensors"))
    (folder / "messages.yaml").write_text(recipe.replace("data: train", "data: messages", 1))
    (folder / "hostile.yaml").write_text(recipe + "".join(f"k{i}: 1\n" for i in range(4_900)))
    rng = random.Random(0)
    turns = build_row(rng, ["ab"])["messages"]
    rows: dict[str, Json] = {
        "train": {"messages": turns},
        "eval": {"messages": turns},
        "test": {"messages": turns},
        "long": build_row(rng, ["ab cd " * 20_000]),
        "messages": {"messages": turns * 500},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")


def change_tokenizer(folder: Path, name: str, parts: Json, vocabulary: dict[str, int]) -> None:
    """Copy the model with another tokenizer."""
    shutil.copytree(folder / "model", folder / name)
    file = folder / name / "tokenizer.json"
    data = json.loads(file.read_text()) | parts
    data["model"]["vocab"] |= vocabulary
    file.write_text(json.dumps(data))


def build_row(rng: random.Random, words: Sequence[str]) -> Json:
    question = " ".join(rng.choices(words, k=16))
    answer = " ".join(rng.choices(words, k=8))
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


# ---------------------------------------------------------------- one interruption


def interrupt(
    words: str, folder: Path, delay: float, number: signal.Signals, *, uses_cpu_time: bool
) -> Outcome | None:
    """Start a verb, send the signal after `delay` seconds, perhaps of processor time; None if the
    verb ended before."""
    scratch = folder / "scratch"
    scratch.mkdir()
    before = measure_children()
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *words.split()],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=restore_signals,
    )
    watched = psutil.Process(process.pid)
    if not (wait_for_cpu(process, watched, delay) if uses_cpu_time else wait(process, delay)):
        return None
    children = watched.children(recursive=True)
    used = sum(watched.cpu_times()[:4])
    sent = time.perf_counter()
    process.send_signal(number)
    output, _ = process.communicate()
    seconds = time.perf_counter() - sent
    _, alive = psutil.wait_procs(children, timeout=1)
    problems = [f"left process {child.pid}" for child in alive]
    code = 128 - process.returncode if process.returncode < 0 else process.returncode
    if "Traceback" in output:
        problems.append("traceback")
    if code not in (0, 128 + number):
        problems.append(f"exit code {code}")
    cpu_seconds = measure_children() - before - used
    problems += find_remains(folder)
    return Outcome(delay, number, seconds, cpu_seconds, code, tuple(problems), output)


def wait(process: subprocess.Popen[str], delay: float) -> bool:
    """Wait, and return whether the process still runs."""
    try:
        process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        return True
    return False


def wait_for_cpu(process: subprocess.Popen[str], watched: psutil.Process, seconds: float) -> bool:
    """Wait until a process and its children have used so much, and return whether it runs."""
    while process.poll() is None:
        used = 0.0
        for each in [watched, *watched.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                used += sum(each.cpu_times()[:4])
        if used >= seconds:
            return process.poll() is None
        time.sleep(0.01)
    return False


def measure_children() -> float:
    """Return the processor seconds of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def restore_signals() -> None:
    """A shell ignores SIGINT in background processes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def find_remains(folder: Path) -> Iterator[str]:
    """Yield the files below a folder that are temporary or incomplete."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_scratch = path.parent.name == "scratch" and not path.name.startswith("torchinductor")
        if path.name.startswith((".tmp-", ".trash-")) or is_scratch:
            yield f"left {name}"
        elif path.is_file() and not is_complete(path):
            yield f"half-written {name}"


def is_complete(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".jsonl" and path.name != "many.jsonl":
            for line in path.read_text("utf-8").splitlines():
                json.loads(line)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                file.keys()
        elif path.suffix == ".html":
            return path.read_text("utf-8").rstrip().endswith("</html>")
    except (OSError, ValueError, SafetensorError):
        return False
    return True


# ---------------------------------------------------------------- the table


def measure_verb(name: str, inputs: Path) -> Iterator[Outcome]:
    """Yield one outcome for each delay, with SIGINT and SIGTERM in turn at the longer ones."""
    uses_cpu_time = name in HOSTILE_VERBS
    words = (VERBS | HOSTILE_VERBS)[name]
    for index, delay in enumerate(CPU_DELAYS if uses_cpu_time else DELAYS):
        number = signal.SIGTERM if index % 4 == 2 else signal.SIGINT
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "work"
            shutil.copytree(inputs, folder)
            outcome = interrupt(words, folder, delay, number, uses_cpu_time=uses_cpu_time)
        if outcome is None:
            return
        yield outcome


def main(model: str, names: Sequence[str]) -> None:
    with TemporaryDirectory() as scratch:
        inputs = Path(scratch)
        if model != "real":
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
            from tiny_export import save_model

            save_model(inputs / "model")
        if model == "hostile":
            write_hostile_inputs(inputs)
        else:
            write_inputs(inputs, "smollm2-135m-instruct" if model == "real" else "model")
        print(
            "| verb | signals | longest delay | slowest end | most processor time | exit codes "
            "| problems |"
        )
        print("|---|---|---|---|---|---|---|", flush=True)
        for name in names or (HOSTILE_VERBS if model == "hostile" else VERBS):
            outcomes = list(measure_verb(name, inputs))
            print_row(name, outcomes)


def print_row(name: str, outcomes: Sequence[Outcome]) -> None:
    codes = ", ".join(map(str, sorted({outcome.exit_code for outcome in outcomes})))
    problems = sorted({text for outcome in outcomes for text in outcome.problems})
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    costliest = max(outcomes, key=lambda outcome: outcome.cpu_seconds)
    print(
        f"| `{name}` | {len(outcomes)} | {outcomes[-1].delay:g} s "
        f"| {slowest.seconds:.2f} s, after {slowest.delay:g} s "
        f"| {costliest.cpu_seconds:.2f} s, after {costliest.delay:g} s | {codes} "
        f"| {'; '.join(problems) or 'none'} |",
        flush=True,
    )
    for outcome in outcomes:
        if outcome.problems or outcome.seconds > 1:
            print(
                f"{name} {outcome.delay} {outcome.number.name} {outcome.seconds:.2f} "
                f"{outcome.cpu_seconds:.2f} {outcome.problems}\n{outcome.output[-1500:]}",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
