"""One base, many adapters: mixed answers equal each alone, and a name never answers with other
weights than it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_runs import save_writer_folder
from tiny_server import LiveServer, make_chat, make_settings, read_metric, save_toy_adapter, serving
from tunesmith.core.atomic import hash_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.serve import server as serve_server
from tunesmith.serve.errors import RequestError
from tunesmith.serve.handlers import find_folder
from tunesmith.serve.sources import open_adapter, open_base

pytestmark = pytest.mark.promise


NO_END = {"257": -100, "258": -100}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "return_token_ids": True}
WEIGHTS = "adapter_model.safetensors"


def chat(live: LiveServer, model: str, text: str = "hello", **more: Any) -> Any:
    with live.client() as http:
        body = make_chat(model, text, **(GREEDY | more))
        response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def get_ids(answer: Any) -> list[int]:
    return answer["choices"][0]["token_ids"]


def answer_by_peft(base: Path, adapter: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the greedy answer of PEFT with transformers, up to an end token."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(network, adapter).eval()
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=[257, 258],
        pad_token_id=258,
    )
    return out[0, len(prompt) :].tolist()


# ---------------------------------------------------------------- mixed batches


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT with transformers 5.24
def test_a_mixed_batch_is_each_alone_and_peft(
    live: LiveServer, writer: Path, adapters: dict[str, Path]
) -> None:
    names = ["base", *adapters, "small-half", "dora-half", "large-zero"]
    alone = {name: get_ids(chat(live, name)) for name in names}
    assert len({tuple(ids) for ids in alone.values()}) >= 6  # the adapters have an effect
    with ThreadPoolExecutor(len(names) * 2) as pool:
        mixed = list(pool.map(lambda name: (name, chat(live, name)), names * 2))
    for name, answer in mixed:
        assert get_ids(answer) == alone[name], name
    for name, path in adapters.items():
        prompt = chat(live, name)["prompt_token_ids"]
        assert get_ids(chat(live, name)) == answer_by_peft(writer, path, prompt, 24), name
    assert alone["large-zero"] == alone["base"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT with transformers 5.24
def test_answers_are_scored_as_lm_eval_asks_for_it(
    live: LiveServer, writer: Path, adapters: dict[str, Path]
) -> None:
    """The body is that of lm-eval 0.4.13 (local-completions, tokenized requests, batches)."""
    prompts = [list(b"abcabc"), list(b"the end of a longer text"), list(b"ab")]
    body = {
        "model": "large", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }  # fmt: skip
    with live.client() as http:
        choices = http.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    network = AutoModelForCausalLM.from_pretrained(writer, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(network, adapters["large"]).eval()
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for choice, ids in zip(choices, prompts, strict=True):
        with torch.no_grad():
            logprobs_LV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = logprobs_LV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        scored = choice["logprobs"]["token_logprobs"]
        assert scored[1:-1] == pytest.approx(expected, abs=1e-4)  # the last is a new token
        for top, row_V in zip(choice["logprobs"]["top_logprobs"][1:-1], logprobs_LV, strict=False):
            assert max(top.values()) == pytest.approx(float(row_V.max()), abs=1e-4)


def test_each_adapter_has_its_own_template(
    live: LiveServer, writer: Path, adapters: dict[str, Path]
) -> None:
    for name, path in {"base": writer, **adapters}.items():
        renderer = Renderer.from_folder(path, now=datetime.now())
        expected = renderer.encode_prompt([{"role": "user", "content": "hello"}])
        assert tuple(chat(live, name)["prompt_token_ids"]) == expected, name
    assert chat(live, "plain")["prompt_token_ids"] != chat(live, "base")["prompt_token_ids"]


def test_one_prompt_of_many_models_in_turn(live: LiveServer) -> None:
    """Stored keys and values of one adapter never answer for another: one long prompt."""
    text = "the same long prompt " * 10
    first = {name: get_ids(chat(live, name, text)) for name in ("small", "large", "base")}
    for name in ("small", "large", "small", "base", "large", "base"):
        assert get_ids(chat(live, name, text)) == first[name]


def test_a_scale_needs_a_name(live: LiveServer) -> None:
    with live.client() as http:
        response = http.post("/v1/chat/completions", json=make_chat("small@0.5"))
    assert response.status_code == 404
    assert "gets a name by serve.yaml" in response.json()["error"]["message"]


def test_a_model_is_described_without_a_path(live: LiveServer, adapters: dict[str, Path]) -> None:
    with live.client() as http:
        listed = http.get("/v1/models")
    assert str(adapters["small"].parent) not in listed.text
    by_name = {model["id"]: model for model in listed.json()["data"]}
    small = by_name["small"]
    assert small["parent"] == "base"
    assert small["root"] == small["tunesmith"]["digest"]
    assert small["tunesmith"]["unproven"] is False
    whole = [name for name in by_name if not name.endswith(("-half", "-zero"))]
    assert len({by_name[name]["root"] for name in whole}) == len(whole)


# ---------------------------------------------------------------- changes of a running server


@pytest.fixture
def folder(adapters: dict[str, Path], tmp_path: Path) -> Path:
    """Return a folder with two adapters for the server to take."""
    for name in ("small", "large"):
        shutil.copytree(adapters[name], tmp_path / "models" / name)
    return tmp_path / "models"


@pytest.fixture
def changing(writer: Path, folder: Path) -> Iterator[LiveServer]:
    settings = make_settings({"json": folder / "small"}, base=str(writer), models_dir=folder)
    with serving(settings) as server:
        yield server


def put(live: LiveServer, name: str, source: str, **more: Any) -> Any:
    headers = {"if-match": more.pop("if_match")} if "if_match" in more else {}
    with live.client() as http:
        return http.put(f"/admin/models/{name}", json={"from": source, **more}, headers=headers)


def test_add_replace_and_remove(changing: LiveServer, live: LiveServer) -> None:
    small = get_ids(chat(live, "small"))
    large = get_ids(chat(live, "large"))
    assert get_ids(chat(changing, "json")) == small
    added = put(changing, "other", "large")
    assert added.status_code == 200
    assert get_ids(chat(changing, "other")) == large
    digest = added.headers["etag"]
    assert put(changing, "json", "large", if_match=digest).status_code == 412
    assert get_ids(chat(changing, "json")) == small
    with changing.client() as http:
        etag = http.get("/admin/models/json").headers["etag"]
    assert put(changing, "json", "large", if_match=etag).status_code == 200
    assert get_ids(chat(changing, "json")) == large
    with changing.client() as http:
        assert http.delete("/admin/models/json").status_code == 204
        assert http.delete("/admin/models/json").status_code == 404
        assert http.delete("/admin/models/base").status_code == 400
        assert http.post("/v1/chat/completions", json=make_chat("json")).status_code == 404
    assert get_ids(chat(changing, "other")) == large


def test_a_stream_keeps_its_adapter_while_the_name_changes(
    changing: LiveServer, live: LiveServer
) -> None:
    options: Any = {"temperature": 0, "max_tokens": 300, "logit_bias": NO_END}
    expected = chat(live, "small", **options)["choices"][0]["message"]["content"]
    texts: list[str] = []
    with changing.client() as http:
        body = make_chat("json", stream=True, **options)
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            version = response.headers["x-tunesmith-model"]
            lines = response.iter_lines()
            for line in lines:
                if not line.startswith("data: {"):
                    continue
                texts.append(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))
                if len(texts) == 3:
                    assert put(changing, "json", "large").status_code == 200
    assert "".join(texts) == expected
    assert version.startswith("json@1#")
    assert get_ids(chat(changing, "json")) == get_ids(chat(live, "large"))
    bank = changing.server.registry._bank
    assert changing.call(_count_adapters, changing, bank) == 1  # the old one is gone


async def _count_adapters(live: LiveServer, bank: Any) -> int:
    return await live.server.scheduler.run_between_steps(lambda: len(bank.keys))


def test_the_same_name_with_new_weights_answers_anew(
    changing: LiveServer, folder: Path, writer: Path
) -> None:
    """With a warm cache, over and over: never an answer of the old weights."""
    text = "the same long prompt " * 10
    old = get_ids(chat(changing, "json", text))
    with changing.client() as http:
        first = http.get("/v1/models/json").json()["root"]
    shutil.rmtree(folder / "small")
    save_toy_adapter(folder / "small", writer, seed=77, lora_r=2)
    assert put(changing, "json", "small").status_code == 200
    with changing.client() as http:
        assert http.get("/v1/models/json").json()["root"] != first
    answers = [get_ids(chat(changing, "json", text)) for _ in range(4)]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0] != old


# ---------------------------------------------------------------- refused at the door


def spoil(folder: Path, kind: str, tmp_path: Path) -> None:
    """Change the adapter `large` in a way that must be noticed."""
    path = folder / "large"
    if kind == "base":
        other = save_writer_folder(tmp_path / "other")
        weights = load_file(other / "model.safetensors")
        weights["model.norm.weight"] *= 2
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(path)
        save_toy_adapter(path, other)
    elif kind == "template":
        template = path / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
    elif kind == "tokenizer":
        file = path / "tokenizer.json"
        file.write_text(file.read_text().replace("<|text|>", "<|other|>"))
    elif kind == "cut":
        file = path / WEIGHTS
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "no weights":
        (path / WEIGHTS).unlink()
    elif kind == "unproven":
        (path / "tunesmith.json").unlink()
    elif kind == "variables":
        provenance = read_json(path / "tunesmith.json")
        provenance["variables"] = {"enable_thinking": False}
        (path / "tunesmith.json").write_text(json.dumps(provenance))
    else:
        tensors = spoil_weights(kind, load_file(path / WEIGHTS))
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        if kind != "other weights":  # even the hash is right
            provenance = read_json(path / "tunesmith.json")
            provenance["weights_sha256"] = hash_file(path / WEIGHTS)
            (path / "tunesmith.json").write_text(json.dumps(provenance))


def spoil_weights(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first = next(name for name in tensors if "lora_B" in name)
    if kind == "NaN":
        tensors[first][0, 0] = torch.nan
    elif kind == "shape":
        tensors[first] = tensors[first][:-1].clone()
    elif kind == "names":
        name = "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"
        tensors[name] = tensors[first].clone()
    elif kind == "other weights":
        return {name: 0.9 * tensor for name, tensor in tensors.items()}
    return tensors


KINDS = (
    "base",
    "template",
    "tokenizer",
    "no weights",
    "NaN",
    "shape",
    "names",
    "variables",
    "other weights",
    "cut",
    "unproven",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_belong_is_refused_and_the_old_one_serves_on(
    kind: str, changing: LiveServer, folder: Path, tmp_path: Path
) -> None:
    before = get_ids(chat(changing, "json"))
    spoil(folder, kind, tmp_path)
    response = put(changing, "json", "large")
    assert response.status_code in (409, 503), response.text
    assert response.json()["error"]["code"] in ("not_published", "model_not_loaded")
    assert get_ids(chat(changing, "json")) == before
    assert str(folder) not in response.text


def test_a_schema_to_follow_has_to_be_there(changing: LiveServer) -> None:
    response = put(changing, "json", "large", constrain=True)
    assert response.status_code == 409
    assert "no response_schema" in response.json()["error"]["message"]


def test_the_base_is_hashed_once(writer: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """What counts is the base in memory, whatever becomes of its files."""
    shutil.copytree(writer, tmp_path / "base")
    base = open_base(str(tmp_path / "base"), datetime.now())
    file = tmp_path / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with base.scratch:
        assert open_adapter(str(adapters["small"]), base).label == "small"
    changed_base = open_base(str(tmp_path / "base"), datetime.now())
    with changed_base.scratch, pytest.raises(InputError, match="base weights"):
        open_adapter(str(adapters["small"]), changed_base)


def test_adapters_share_a_tokenizer_only_if_all_its_files_are_equal(
    writer: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapters["small"], other)
    (other / "tunesmith.json").unlink()
    (other / "generation_config.json").write_text('{"eos_token_id": 256}')
    base = open_base(str(writer), datetime.now())
    with base.scratch:
        small, large, plain = (
            open_adapter(str(adapters[name]), base).renderer for name in ("small", "large", "plain")
        )
        changed = open_adapter(str(other), base, is_unproven_allowed=True).renderer
    assert small is large
    assert plain.fingerprint != small.fingerprint
    assert changed.fingerprint == small.fingerprint
    assert changed.end_ids != small.end_ids


def test_unproven_weights_are_served_on_request_and_say_so(
    changing: LiveServer, folder: Path
) -> None:
    (folder / "large" / "tunesmith.json").unlink()
    response = put(changing, "wild", "large", unproven=True)
    assert response.status_code == 200
    assert response.json()["tunesmith"]["unproven"] is True
    assert get_ids(chat(changing, "wild"))


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "%2e%2e%2fx", "a%00b", "x" * 300, "jsоn", "base", "A", "-x", "a b"]
)
def test_names_that_are_no_names(name: str, changing: LiveServer) -> None:
    assert put(changing, name, "large").status_code in (400, 404, 405)


def test_only_folders_inside_are_taken(tmp_path: Path, adapters: dict[str, Path]) -> None:
    root = tmp_path / "models"
    root.mkdir()
    shutil.copytree(adapters["small"], root / "runs" / "one")
    (root / "out").symlink_to(adapters["small"])
    (root / "in").symlink_to(root / "runs" / "one")
    assert find_folder(root, "runs/one") == (root / "runs" / "one").resolve()
    for wrong in (
        str(adapters["small"]), "../adapters/small", "runs/../runs/one", "out", "in", "runs//one",
        "runs/one/", "./runs", "nothing", "a\0b", "runs/one\n", "~", "runs\\one", "a/" * 50,
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            find_folder(root, wrong)
        assert caught.value.status in (400, 404)
    with pytest.raises(RequestError, match="models-dir"):
        find_folder(None, "runs/one")


# ---------------------------------------------------------------- memory


def test_cold_adapters_are_loaded_once_and_dropped_by_last_use(
    writer: Path, tmp_path: Path
) -> None:
    paths = [save_toy_adapter(tmp_path / f"a{n}", writer, seed=n) for n in range(6)]
    models = {path.name: path for path in paths}
    num_bytes = (paths[0] / WEIGHTS).stat().st_size
    with serving(
        make_settings(models, base=str(writer), limits={"adapters": 3 * num_bytes})
    ) as live:
        alone = {name: get_ids(chat(live, name)) for name in models}
        registry = live.server.registry
        assert registry.count_bytes() <= 3 * num_bytes
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda n: (n, try_chat(live, f"a{n % 6}")), range(36)))
        served = [(n, answer) for n, answer in answers if answer is not None]
        assert len(served) > 6
        for n, answer in served:
            assert get_ids(answer) == alone[f"a{n % 6}"]
        assert registry.count_bytes() <= 3 * num_bytes
        with live.client() as http:
            text = http.get("/metrics").text
        assert "tunesmith_evictions_total 0.0" not in text


def try_chat(live: LiveServer, model: str) -> Any:
    """Return an answer, None if the memory is full of adapters in use."""
    with live.client() as http:
        response = http.post("/v1/chat/completions", json=make_chat(model, **GREEDY))
    assert response.status_code in (200, 503)
    if response.status_code == 503:
        assert response.json()["error"]["code"] == "adapters_full"
        return None
    return response.json()


def test_a_start_loads_pinned_adapters_and_a_few_others(
    writer: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand models have to be ready soon: the others are loaded when they are asked for."""
    monkeypatch.setattr(serve_server, "LOADED_AT_START", 2)
    models: dict[str, Any] = {name: {"from": str(path)} for name, path in adapters.items()}
    models["plain"]["pin"] = True  # the last of them
    models["small-2"] = models["small"]  # of the same content: no further load
    with serving(make_settings(models, base=str(writer))) as live:
        assert read_metric(live, "adapter_loads_total", result="ok") == 3
        with live.client() as http:
            listed = http.get("/v1/models").json()["data"]
        resident = {model["id"] for model in listed if model["tunesmith"]["resident"]}
        assert resident == {"base", "plain", "small", "small-2", "large"}
        chat(live, "dora")
        assert read_metric(live, "adapter_loads_total", result="ok") == 4
