"""The process that encodes for `guarded_tokenizer.py`, run as a script with limits on memory.

    python -I encode_worker.py LIBRARY_FOLDER LOAD_SECONDS

In: a tokenizer.json on one line, then requests, one a line. Out: READY when the library is there,
then a reply to each line. A reply that takes more processor time than LOAD_SECONDS, or than the
`seconds` of its request for each thread, ends the process by SIGPROF, even if its parent was killed
and nobody waits for it. Imports nothing of tunesmith."""

import json
import os
import resource
import signal
import sys
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.argv[1])  # last, so that nothing there replaces the standard library

from tokenizers import Tokenizer

READY = "ready"
MAX_BYTES = 2**30  # beside what the file itself needs
BYTES_PER_CHAR = 20  # of tokenizer.json, in memory
PROBES = ("x", " ", "\n", "1", "x ", "x\n", "x1", ".", "é", "x.")
PROBE_REPEATS = 500


def main() -> None:
    write_line(READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # panics would fill the file
    line = sys.stdin.readline()
    limit = MAX_BYTES + BYTES_PER_CHAR * len(line)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends even a search that is stuck
    tokenizer = None
    while line:
        try:
            if tokenizer is None:
                signal.setitimer(signal.ITIMER_PROF, float(sys.argv[2]))
                tokenizer = load_tokenizer(line)
                reply = {}
            else:
                request = json.loads(line)
                signal.setitimer(signal.ITIMER_PROF, request["seconds"] * count_threads(request))
                reply = answer_request(tokenizer, request)
        except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
            reply = {"error": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_line(json.dumps(reply))
        line = sys.stdin.readline()


def write_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def load_tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


def count_threads(request: dict[str, Any]) -> int:
    """Return how many threads encode the texts of a request: the timer counts the time of all."""
    threads = int(os.environ.get("RAYON_NUM_THREADS", "1"))
    return max(1, min(threads, len(request.get("texts", ()))))


def answer_request(tokenizer: Tokenizer, request: dict[str, Any]) -> dict[str, Any]:
    if request.get("probe"):
        probe_tokenizer(tokenizer)
        return {}
    text = request.get("normalize")
    if isinstance(text, str):
        normalizer = tokenizer.normalizer
        return {"text": text if normalizer is None else normalizer.normalize_str(text)}
    encodings = tokenizer.encode_batch_fast(
        request["texts"], add_special_tokens=bool(request["special"])
    )
    return {"ids": [encoding.ids for encoding in encodings]}


def probe_tokenizer(tokenizer: Tokenizer) -> None:
    """Encode texts on which bad patterns are slow, in a batch, which starts the threads."""
    tokenizer.encode_batch_fast([probe * PROBE_REPEATS for probe in PROBES])


if __name__ == "__main__":
    main()
