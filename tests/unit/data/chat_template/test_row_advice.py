"""Refusals of conversations name what would make them train, found by trying."""

from dataclasses import replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import pytest

from toy_chat import CHATML, assistant, make_example, render_marked, user, write_model_folder
from tunesmith.core.errors import InputError
from tunesmith.data.chat_template import row_advice
from tunesmith.data.chat_template.renderer import Renderer

NOW = datetime(2026, 3, 4)
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"


def thinking(condition: str) -> str:
    """A template that prompts for thinking under a condition."""
    loop = "{% for m in messages %}" + TURN + "{% endfor %}"
    return loop + PROMPT + "{% if " + condition + " %}<think>{% endif %}{% endif %}"


def refusal(renderer: Renderer, *messages: dict) -> InputError:
    with pytest.raises(InputError) as error:
        renderer.render(make_example(*messages))
    return error.value


@pytest.mark.parametrize(
    ("condition", "fix"),
    [
        ("enable_thinking is not defined or enable_thinking", "{enable_thinking: false}"),
        ("not brief", "{brief: true}"),
        ("mode != 'plain'", '{mode: "plain"}'),
        ("mode not in ['plain', 'none']", '{mode: "none"}'),
        ("not (brief and quick)", "{brief: true, quick: true}"),
    ],
)
def test_settings_that_make_a_row_train_are_named(condition: str, fix: str, tmp_path: Path) -> None:
    model = write_model_folder(tmp_path, thinking(condition))
    error = refusal(Renderer.from_folder(model, now=NOW), user("a"), assistant("b"))
    assert "prompts for an answer" in error.message
    assert error.fix == f"set chat_template_kwargs: {fix}"


def test_settings_are_named_beside_those_of_the_recipe(tmp_path: Path) -> None:
    model = write_model_folder(tmp_path, thinking("not (brief and quick)"))
    renderer = Renderer.from_folder(model, now=NOW, variables={"brief": True})
    fix = refusal(renderer, user("a"), assistant("b")).fix
    assert fix == "set chat_template_kwargs: {brief: true, quick: true}"


def test_no_setting_is_named_that_does_not_help(tmp_path: Path) -> None:
    renderer = Renderer.from_folder(
        write_model_folder(tmp_path, thinking("brief or not brief")), now=NOW
    )
    assert "chat_template_kwargs" not in refusal(renderer, user("a"), assistant("b")).fix


def test_tries_are_bounded_and_change_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_advice, "MAX_TRIES", 5)
    renderer = Renderer.from_folder(write_model_folder(tmp_path, thinking("not brief")), now=NOW)
    before = renderer.tokenizer.controls
    rows = [replace(make_example(user("a"), assistant("b")), id=f"rows:{i}") for i in range(20)]
    fixes = {row.error.fix for row in renderer.render_rows(rows) if row.error}
    assert fixes == {"set chat_template_kwargs: {brief: true}"}
    assert renderer.tokenizer.controls == before


@pytest.mark.parametrize(
    "first",
    [
        "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user first') }}{% endif %}",
        "{% if messages[0].role == 'system' %}{% endif %}",
        "{{ messages[0].content.strip()[:0] }}",
    ],
)
@pytest.mark.parametrize("system", [(), ({"role": "system", "content": "s"},)])
def test_a_row_that_begins_with_the_assistant_says_so(
    first: str, system: tuple, tmp_path: Path
) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, first + CHATML), now=NOW)
    row = (*system, assistant("b"), user("c"), assistant("d"))
    (refused,) = renderer.render_rows([make_example(*row)])
    assert (refused.error is None) == bool(system)
    if refused.error is not None:
        assert "begins with the assistant" in refused.error.message
        assert refused.error.fix.startswith("put a user message first")
    assert render_marked(renderer, user("a"), *row[len(system) :])


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma", "phi3", "lfm2", "qwen2_5"])
def test_real_templates_say_that_a_row_begins_with_the_assistant(name: str, tmp_path: Path) -> None:
    source = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()
    tokens = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
    model = write_model_folder(tmp_path, source, tokens, bos_token="<|im_start|>")
    renderer = Renderer.from_folder(model, now=NOW)
    row = make_example(assistant("b"), user("c"), assistant("d"))
    (refused,) = renderer.render_rows([row])
    if refused.error is not None:
        assert "put a user message first" in refused.error.fix


@pytest.mark.parametrize("name", ["nemotron_3_nano", "qwen3_5_nothink"])
def test_real_templates_name_their_setting(name: str, tmp_path: Path) -> None:
    source = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()
    renderer = Renderer.from_folder(write_model_folder(tmp_path, source), now=NOW)
    thoughts = {} if name.startswith("nemotron") else {"reasoning_content": "hm"}
    fix = refusal(renderer, user("a"), assistant("b", **thoughts)).fix
    value = "false" if name.startswith("nemotron") else "true"
    assert fix == f"set chat_template_kwargs: {{enable_thinking: {value}}}"


@pytest.mark.parametrize(
    ("limit", "value", "clock"),
    [
        ("MAX_TRIES", 7, ""),
        ("MAX_SECONDS", 0.05, "thread_time"),
        ("MAX_CLOCK_SECONDS", 0.05, "monotonic"),
    ],
)
def test_tries_are_bounded_for_all_rows_together(
    limit: str, value: float, clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_advice, limit, value)
    condition = "brief or not brief or a or b or c or d or e"
    renderer = Renderer.from_folder(write_model_folder(tmp_path, thinking(condition)), now=NOW)
    tries: list[float] = []
    advisor_class = row_advice.RowAdvisor
    original = advisor_class._try_render

    def count(self: row_advice.RowAdvisor, *args: object) -> bool:
        started = self.num_tries
        result = original(self, *args)  # type: ignore[arg-type]
        tries.append(self.num_tries - started)
        return result

    monkeypatch.setattr(advisor_class, "_try_render", count)
    if clock:
        ticks = iter(range(10**9))
        monkeypatch.setattr(row_advice, clock, lambda: next(ticks) * 0.03)
    rows = [replace(make_example(user("a"), assistant("b")), id=f"rows:{i}") for i in range(30)]
    assert all(row.error for row in renderer.render_rows(rows))
    assert sum(tries) <= (7 if limit == "MAX_TRIES" else 2)
