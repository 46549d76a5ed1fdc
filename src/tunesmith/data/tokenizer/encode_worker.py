"""The process that encodes for `guarded_tokenizer.py`, run as a script with limits on memory.

In: a tokenizer.json on one line, then requests, one a line. Out: a reply to each. Imports nothing
of tunesmith."""

import json
import resource
import sys
from typing import Any

from tokenizers import Tokenizer

MAX_BYTES = 2**30  # beside what the file itself needs
BYTES_PER_CHAR = 20  # of tokenizer.json, in memory
PROBES = ("x", " ", "\n", "1", "x ", "x\n", "x1", ".", "é", "x.")
PROBE_REPEATS = 500


def main() -> None:
    line = sys.stdin.readline()
    limit = MAX_BYTES + BYTES_PER_CHAR * len(line)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tokenizer = None
    request = line
    while request:
        try:
            if tokenizer is None:
                tokenizer = load_tokenizer(request)
                reply = {}
            else:
                reply = answer_request(tokenizer, json.loads(request))
        except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
            reply = {"error": str(error)}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
        request = sys.stdin.readline()


def load_tokenizer(tokenizer_json: str) -> Tokenizer:
    """Load a tokenizer and try it with texts on which bad patterns are slow."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    for probe in PROBES:
        tokenizer.encode(probe * PROBE_REPEATS)
    return tokenizer


def answer_request(tokenizer: Tokenizer, request: dict[str, Any]) -> dict[str, Any]:
    text = request.get("normalize")
    if isinstance(text, str):
        normalizer = tokenizer.normalizer
        return {"text": text if normalizer is None else normalizer.normalize_str(text)}
    encodings = tokenizer.encode_batch_fast(
        request["texts"], add_special_tokens=bool(request["special"])
    )
    return {"ids": [encoding.ids for encoding in encodings]}


if __name__ == "__main__":
    main()
