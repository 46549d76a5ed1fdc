"""A small OpenAI-compatible server over a finished tiny run, for `verify`; stock transformers
answers, so that nothing of tunesmith's own engine is on that side.

A Served run says how: with which scale of the adapter, template, end tokens, temperature. A Fault
says what is wrong with the HTTP of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache

from tiny_runs import make_chat_row, make_tiny_recipe, save_model_folder, train, write_rows
from tunesmith.export.source_run import open_source_run
from tunesmith.model.causal_lm import Network, load_network
from tunesmith.model.merge import merge_into_network

Json = dict[str, Any]
MODEL = "tiny"
COLORS = ("red", "green", "blue", "black")


@dataclass
class Served:
    """A model and how it is served. The options are what a server may lack."""

    network: Network
    tokenizer: Any
    end_ids: tuple[int, ...]
    template: str | None = None
    first_ids: tuple[int, ...] = ()  # put before every prompt
    temperature: float | None = None  # whatever is asked for
    has_usage: bool = True
    has_logprobs: bool = True
    has_ids: bool = True
    has_echo: bool = True
    has_prompt_logprobs: bool = False
    is_strict: bool = False  # 400 for the optional fields
    lock: threading.Lock = field(default_factory=threading.Lock)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def encode(self, body: Json) -> list[int]:
        if "messages" not in body:
            prompt = body["prompt"]
            ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
            return [*self.first_ids, *ids]
        text = self.tokenizer.apply_chat_template(
            body["messages"],
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
            **body.get("chat_template_kwargs", {}),
        )
        return [*self.first_ids, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    @torch.no_grad()
    def generate(self, ids: list[int], body: Json) -> tuple[list[int], list[torch.Tensor]]:
        """Return the new tokens and the log-probabilities [V] of each step."""
        temperature = body["temperature"] if self.temperature is None else self.temperature
        tokens: list[int] = []
        steps: list[torch.Tensor] = []
        cache = DynamicCache()
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in self.end_ids):
            new_ids = torch.tensor([tokens[-1:] or ids])
            output = self.network(new_ids, cache=cache, use_cache=True)
            logits = output.logits[0, -1]
            steps.append(logits.log_softmax(-1))
            if temperature:
                weights = (logits / temperature).softmax(-1)
                tokens.append(int(torch.multinomial(weights, 1, generator=self.generator)))
            else:
                tokens.append(int(logits.argmax()))
        return tokens, steps

    @torch.no_grad()
    def score(self, ids: list[int]) -> list[float | None]:
        logprobs = self.network(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores = [float(logprobs[position, token]) for position, token in enumerate(ids[1:])]
        return [None, *scores]

    def describe(self, token: int, logprob: float) -> Json:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def chat(self, body: Json) -> Json:
        ids = self.encode(body)
        tokens, steps = self.generate(ids, body)
        is_ended = tokens[-1] in self.end_ids
        answer = tokens[:-1] if is_ended else tokens
        choice: Json = {
            "index": 0,
            "message": {"role": "assistant", "content": self.tokenizer.decode(answer)},
            "finish_reason": "stop" if is_ended else "length",
        }
        if self.has_logprobs and body.get("logprobs"):
            content: list[Json] = []
            for token, step in zip(tokens, steps, strict=True):
                best = step.topk(body["top_logprobs"])
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                listed = [self.describe(other, value) for other, value in pairs]
                entry = self.describe(token, float(step[token]))
                content.append({**entry, "top_logprobs": listed})
            choice["logprobs"] = {"content": content}
        reply: Json = {"object": "chat.completion", "choices": [choice]}
        if self.has_usage:
            reply["usage"] = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        if self.has_ids and body.get("return_token_ids"):
            reply["prompt_token_ids"] = ids
        return reply

    def complete(self, body: Json) -> Json:
        ids = self.encode(body)
        tokens, _ = self.generate(ids, body)
        is_ended = tokens[-1] in self.end_ids
        text = self.tokenizer.decode(tokens[:-1] if is_ended else tokens)
        choice: Json = {"text": text, "finish_reason": "stop" if is_ended else "length"}
        if self.has_echo and body.get("echo"):
            choice["logprobs"] = {"token_logprobs": self.score([*ids, *tokens])}
        if self.has_prompt_logprobs and "prompt_logprobs" in body:
            pairs = zip(ids, self.score(ids), strict=True)
            choice["prompt_logprobs"] = [
                None if score is None else {str(token): {"logprob": score, "rank": 1}}
                for token, score in pairs
            ]
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        return {"object": "text_completion", "choices": [choice], "usage": usage}


def load_served(
    run: Path, *, scale: float = 1.0, base: Path | None = None, bits: int = 0, **options: Any
) -> Served:
    """Load a run as another engine would: its adapter merged into the stock base in fp32.

    base: another base model. bits: round the base's matrices to so many bits first."""
    source = open_source_run(run)
    network = source.load_base_network() if base is None else load_network(base, torch.float32)
    if bits:
        round_matrices(network, bits)
    if scale:
        merge_into_network(network, source.with_scale(scale).changes)
    network.eval()
    tokenizer = AutoTokenizer.from_pretrained(source.saved_dir)
    options = {"end_ids": source.renderer.end_ids, **options}
    return Served(network, tokenizer, **options)


def round_matrices(network: Network, bits: int) -> None:
    """Round each row of each matrix to integers of so many bits times a scale."""
    limit = 2 ** (bits - 1) - 1
    for parameter in network.parameters():
        if parameter.ndim == 2:
            scale = parameter.data.abs().amax(1, keepdim=True) / limit
            parameter.data = (parameter.data / scale).round() * scale


def train_color_run(folder: Path) -> Path:
    """Train a run that learned which color follows; beside it stand its base `model` and another
    base of the same shapes, `other`. Return the folder of the run."""
    save_model_folder(folder / "model")
    save_model_folder(folder / "other", seed=1)
    rows = [
        make_chat_row(f"{COLORS[n % 4]} {n}", f"{COLORS[(n + 1) % 4]} it is") for n in range(52)
    ]
    return train_on_rows(folder, rows)


def train_on_rows(folder: Path, rows: Sequence[Json], **changed: Any) -> Path:
    """Train a run of the model in `folder` on 40 rows, test it on the others, and return its
    folder."""
    recipe = make_tiny_recipe(
        folder / "model",
        folder,
        data=str(write_rows(folder / "rows.jsonl", rows[:40])),
        test_data=str(write_rows(folder / "test.jsonl", rows[40:])),
        num_train_epochs=16,
        batch_size=8,
        lora_r=8,
        learning_rate=0.02,
        metrics=["exact_match"],
        **changed,
    )
    train(recipe)
    return folder / "run"


@dataclass
class Fault:
    """What goes wrong with POST requests, or with all of them."""

    status: int = 200
    headers: Json = field(default_factory=dict)
    content: bytes | None = None  # in place of the reply
    seconds: float = 0.0  # of silence before it
    is_cut: bool = False  # the connection ends in the middle
    is_endless: bool = False
    times: int = 10**9
    after: int = 0  # requests that go well before it
    has_models: bool = True  # GET /models goes well


class LiveServer:
    """A running server: its URL, the paths and headers of the requests so far."""

    def __init__(self, served: Served | None, key: str = "", fault: Fault | None = None) -> None:
        self.served = served
        self.key = key
        self.fault = fault
        self.url = ""
        self.requests: list[tuple[str, Json]] = []

    def answer(self, path: str, body: Json) -> tuple[int, Json]:
        served = self.served
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
        assert served is not None
        if body.get("model") != MODEL:
            return 404, {"error": {"message": f"The model `{body.get('model')}` does not exist."}}
        if served.is_strict and {"logprobs", "return_token_ids", "echo"} & set(body):
            return 400, {"error": {"message": "unknown field"}}
        actions: dict[str, Callable[[Json], Json]] = {
            "/v1/chat/completions": served.chat,
            "/v1/completions": served.complete,
        }
        if path not in actions:
            return 404, {"detail": "Not Found"}
        with served.lock:
            return 200, actions[path](body)

    def take_fault(self, path: str) -> Fault | None:
        fault = self.fault
        if fault is None or (path == "/v1/models" and fault.has_models):
            return None
        if fault.after > 0:
            fault.after -= 1
            return None
        fault.times -= 1
        return fault if fault.times >= 0 else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    live: LiveServer

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self._reply(json.loads(self.rfile.read(length)))

    def _reply(self, body: Json) -> None:
        live = self.live
        live.requests.append((self.path, dict(self.headers)))
        if live.key and self.headers["Authorization"] != f"Bearer {live.key}":
            shown = self.headers["Authorization"]
            self._send(401, json.dumps({"error": {"message": f"no such key: {shown}"}}).encode())
            return
        fault = live.take_fault(self.path)
        if fault is not None:
            self._fail(fault)
            return
        status, reply = live.answer(self.path, body)
        self._send(status, json.dumps(reply).encode())

    def _fail(self, fault: Fault) -> None:
        time.sleep(fault.seconds)
        content = fault.content if fault.content is not None else b"{}"
        if fault.is_cut:
            self._send(200, content, {"Content-Length": str(2 * len(content) + 10)})
            self.close_connection = True
        elif fault.is_endless:
            self._send_endless()
        else:
            self._send(fault.status, content, fault.headers)

    def _send_endless(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(b" " * 2**16)
        except OSError:
            return

    def _send(self, status: int, content: bytes, headers: Json | None = None) -> None:
        sent = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        self.send_response(status)
        for name, value in {**sent, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that gives up closes its connection."""


@contextmanager
def serving(
    served: Served | None, *, key: str = "", fault: Fault | None = None
) -> Iterator[LiveServer]:
    """Run a server on a free port of this machine."""
    live = LiveServer(served, key, fault)
    handler = type("Handler", (_Handler,), {"live": live})
    server = _QuietServer(("127.0.0.1", 0), handler)
    live.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield live
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
