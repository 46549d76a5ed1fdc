"""Feedback: who may give it on what, and files that are read as they are."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from full_disk import file_limit
from tiny_server import LiveServer, make_chat, make_settings, pausing_engine, serving
from tunesmith import api
from tunesmith.core.errors import InputError
from tunesmith.serve import feedback
from tunesmith.serve.errors import RequestError
from tunesmith.serve.feedback import KEEP_SECONDS, ChatRing, KeptChat
from tunesmith.serve.keys import add_key, make_anonymous_key

CHAT = "/v1/chat/completions"
FEEDBACK = "/v1/feedback"
# no answer ends at once, and none has the NUL character, which no row may have
LONG: dict[str, Any] = {"logit_bias": {"257": -100, "258": -100, "188": -100}}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return {
        "file": str(path),
        "ada": add_key(path, "ada", scopes=("infer", "feedback"))[0],
        "bob": add_key(path, "bob", scopes=("infer", "feedback"))[0],
        "mute": add_key(path, "mute")[0],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("content") / "kept"


@pytest.fixture(scope="module")
def kept(
    writer: Path, adapters: dict[str, Path], keys: dict[str, str], folder: Path
) -> Iterator[LiveServer]:
    models = {"small": adapters["small"]}
    with serving(
        make_settings(models, base=str(writer), keys=Path(keys["file"]), keep_content=folder)
    ) as server:
        yield server


@pytest.fixture
def ada(kept: LiveServer, keys: dict[str, str]) -> Iterator[httpx.Client]:
    with kept.client(headers={"authorization": f"Bearer {keys['ada']}"}) as http:
        yield http


def ask(http: httpx.Client, text: str = "hello", **more: Any) -> tuple[str, str]:
    """Return the id of a request and its answer."""
    response = http.post(CHAT, json=make_chat("small", text, max_tokens=6, **LONG, **more))
    assert response.status_code == 200, response.text
    answer = response.json()["choices"][0]["message"]["content"]
    return response.headers["x-request-id"], answer


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def review(http: httpx.Client, request_id: str, verdict: str = "good", **more: Any) -> Any:
    return http.post(FEEDBACK, json={"request_id": request_id, "verdict": verdict, **more})


# ---------------------------------------------------------------- from serving to training


@pytest.mark.promise
def test_the_files_go_through_lock_check_and_plan_unedited(
    ada: httpx.Client, folder: Path, writer: Path, tmp_path: Path
) -> None:
    for number in range(6):
        request_id, answer = ask(ada, f"question {number}", seed=number)
        corrected = {"corrected": f"the right answer {number}"} if number % 2 else {}
        verdict = "bad" if number % 2 else "good"
        assert review(ada, request_id, verdict, **corrected).status_code == 201
        row = read_rows(folder / "feedback.jsonl")[-1]
        assert row["messages"][-1]["content"] == corrected.get("corrected", answer)
        assert row["served"]["request"] == request_id
        assert row["review"]["reviewer"] == "ada"
    pairs = read_rows(folder / "pairs.jsonl")
    assert [pair["chosen"][0]["content"] for pair in pairs[-3:]] == [
        f"the right answer {number}" for number in (1, 3, 5)
    ]
    for name in ("feedback.jsonl", "pairs.jsonl"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    recipe: dict[str, Any] = {"model": str(writer), "output_dir": str(tmp_path / "run")}
    pair_recipe = {**recipe, "stage": "preference", "data": str(tmp_path / "pairs.jsonl")}
    checks = {
        "feedback": api.data_check(**recipe, data=str(folder / "feedback.jsonl"))["data"],
        "pairs": api.data_check(**pair_recipe)["data"],
    }
    plan: Any = api.plan(**pair_recipe)
    assert plan.config.stage == "preference"
    golden = api.data_lock(model=str(writer), data=str(tmp_path / "feedback.jsonl"))
    num_rows = len(read_rows(folder / "feedback.jsonl"))
    assert golden.rows == num_rows
    assert golden.reviewers == {"ada": num_rows}
    with pytest.raises(InputError, match=r"in the locked feedback\.jsonl"):
        api.data_check(**pair_recipe)
    assert checks["feedback"].rows == num_rows
    assert checks["pairs"].rows == len(pairs)
    for report in checks.values():
        assert not report.rejected
        assert "served" not in str(report.findings)  # an unused key would be told


def test_a_correction_is_a_good_row_and_a_pair(ada: httpx.Client, folder: Path) -> None:
    request_id, answer = ask(ada, "two turns")
    response = review(ada, request_id, "unsure", corrected="better", comment="too short")
    assert response.json() == {"object": "feedback", "request_id": request_id, "verdict": "unsure"}
    row = read_rows(folder / "feedback.jsonl")[-1]
    pair = read_rows(folder / "pairs.jsonl")[-1]
    assert row["review"].pop("date")
    assert row["review"] == {"reviewer": "ada", "verdict": "good", "comment": "too short"}
    assert row["served"]["verdict"] == "unsure"
    assert row["served"]["model"].startswith("small@1#")
    assert len(row["served"]["digest"]) == 64
    assert pair["prompt"] == row["messages"][:-1] == [{"role": "user", "content": "two turns"}]
    assert pair["rejected"] == [{"role": "assistant", "content": answer}]


def test_earlier_answers_are_not_trained(ada: httpx.Client, folder: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    response = ada.post(CHAT, json={"model": "base", "messages": messages, "max_tokens": 3, **LONG})
    assert review(ada, response.headers["x-request-id"]).status_code == 201
    row = read_rows(folder / "feedback.jsonl")[-1]
    assert [turn.get("train") for turn in row["messages"]] == [None, False, None, None]


def test_a_stream_is_kept_whole(kept: LiveServer, keys: dict[str, str], folder: Path) -> None:
    messages: Any = [{"role": "user", "content": "stream"}]
    with openai.OpenAI(base_url=f"{kept.url}/v1", api_key=keys["ada"], max_retries=0) as client:
        stream = client.chat.completions.create(
            model="small", messages=messages, stream=True, max_tokens=8, **LONG
        )
        chunks = list(stream)
    answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    with kept.client(headers={"authorization": f"Bearer {keys['ada']}"}) as http:
        assert review(http, chunks[0].id).status_code == 201  # the id of the answer
    assert read_rows(folder / "feedback.jsonl")[-1]["messages"][-1]["content"] == answer


def test_a_stream_that_its_client_leaves_is_not_kept(kept: LiveServer, ada: httpx.Client) -> None:
    body = make_chat("small", stream=True, max_tokens=300, **LONG)
    with pausing_engine(kept), ada.stream("POST", CHAT, json=body) as response:
        request_id = response.headers["x-request-id"]
        next(response.iter_lines())
    assert review(ada, request_id).status_code == 404


# ---------------------------------------------------------------- refusals


def test_one_feedback_by_the_key_that_asked(
    ada: httpx.Client, kept: LiveServer, keys: dict[str, str], folder: Path
) -> None:
    request_id, _ = ask(ada)
    num_rows = len(read_rows(folder / "feedback.jsonl"))
    with kept.client(headers={"authorization": f"Bearer {keys['bob']}"}) as bob:
        assert review(bob, request_id).status_code == 404
        assert review(bob, "req-000000000000000000000000").json() == review(bob, request_id).json()
    with kept.client(headers={"authorization": f"Bearer {keys['mute']}"}) as mute:
        assert review(mute, request_id).status_code == 403
    assert len(read_rows(folder / "feedback.jsonl")) == num_rows
    assert review(ada, request_id).status_code == 201
    assert review(ada, request_id, "bad").status_code == 409
    assert len(read_rows(folder / "feedback.jsonl")) == num_rows + 1


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"rating": 5}, 400, "rating"),
        ({"verdict": "great"}, 400, "verdict"),
        ({"verdict": "good", "corrected": "x"}, 400, "correction"),
        ({"corrected": "\ud800"}, 400, "surrogate"),
        ({"corrected": " "}, 409, "empty"),
        ({"corrected": "a\0b"}, 409, "NUL"),
        ({"comment": "x" * 2001}, 400, "comment"),
    ],
)
def test_what_is_no_feedback(
    change: dict[str, Any], status: int, word: str, ada: httpx.Client, folder: Path
) -> None:
    request_id, _ = ask(ada)
    files = [folder / name for name in ("feedback.jsonl", "pairs.jsonl")]
    before = [read_rows(path) for path in files]
    content = json.dumps({"request_id": request_id, "verdict": "bad", **change})
    response = ada.post(FEEDBACK, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert word in response.json()["error"]["message"]
    assert [read_rows(path) for path in files] == before


def test_a_correction_that_corrects_nothing(ada: httpx.Client) -> None:
    request_id, answer = ask(ada)
    response = review(ada, request_id, "bad", corrected=f"{answer} ")
    assert response.status_code == 409
    assert "equal" in response.json()["error"]["message"]


def test_without_the_setting_nothing_is_kept(live: LiveServer) -> None:
    with live.client() as http:
        request_id, _ = ask(http)
        response = review(http, request_id)
    assert response.status_code == 409
    assert "keep_content: FOLDER" in response.json()["error"]["message"]
    assert live.server.feedback is None


def test_several_answers_and_texts_are_not_kept(ada: httpx.Client) -> None:
    request_id, _ = ask(ada, n=2)
    assert review(ada, request_id).status_code == 404
    text = ada.post("/v1/completions", json={"model": "small", "prompt": "a", "max_tokens": 2})
    assert review(ada, text.headers["x-request-id"]).status_code == 404


# ---------------------------------------------------------------- faults


def test_a_full_disk_leaves_whole_lines_and_serves_on(ada: httpx.Client, folder: Path) -> None:
    request_id, _ = ask(ada)
    assert review(ada, request_id, "bad", corrected="first").status_code == 201
    request_id, _ = ask(ada)
    files = [folder / name for name in ("feedback.jsonl", "pairs.jsonl")]
    before = [path.read_bytes() for path in files]
    with file_limit(len(before[0]) + 20):
        response = review(ada, request_id, "bad", corrected="x" * 3000)
        assert response.status_code == 507
        assert "no space left" in response.json()["error"]["message"]
        assert str(folder) not in response.text
        ask(ada)
    assert [path.read_bytes() for path in files] == before
    assert review(ada, request_id, "bad", corrected="second").status_code == 201


def test_all_files_or_none(tmp_path: Path) -> None:
    short, long = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    long.write_bytes(b"x" * 999 + b"\n")
    with file_limit(1002), pytest.raises(feedback.TunesmithError, match="no space left"):
        feedback.append_lines({short: b"one\n", long: b"two\n" * 9})
    assert short.read_bytes() == b""
    assert long.stat().st_size == 1000


def test_a_torn_line_of_a_killed_process_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b"')
    feedback.append_lines({path: b'{"c": 3}\n'})
    assert read_rows(path) == [{"a": 1}, {"c": 3}]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="symbolic link"):
        feedback.append_lines({tmp_path / "a.jsonl": b"{}\n"})
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- the ring


def make_kept(number: int, time: float = 0.0, text: str = "a") -> KeptChat:
    key = make_anonymous_key()
    turn = {"role": "user", "content": text}
    return KeptChat(str(number), key.id, "m", "m@1#0", "0", (turn,), "b", time)


def test_the_ring_forgets_by_number_size_and_age(monkeypatch: pytest.MonkeyPatch) -> None:
    key = make_anonymous_key()
    monkeypatch.setattr(feedback, "MAX_CHATS", 3)
    ring = ChatRing()
    for number in range(5):
        ring.add(make_kept(number))
    assert len(ring) == 3
    assert ring.find("req-2", key, now=KEEP_SECONDS).id == "2"
    with pytest.raises(RequestError, match="no answer with this id"):
        ring.find("req-1", key, now=0)
    with pytest.raises(RequestError):
        ring.find("req-2", key, now=KEEP_SECONDS + 1)
    assert len(ring) == 0
    monkeypatch.setattr(feedback, "MAX_CHARS", 100)
    for number in range(4):
        ring.add(make_kept(number, text="x" * 49))  # 50 with the answer
    assert len(ring) == 2
