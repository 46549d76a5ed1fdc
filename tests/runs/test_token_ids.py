"""What the proof compares with transformers: rows, and prompts where rows are written otherwise."""

from pathlib import Path
from typing import Any

import pytest

from tiny_runs import make_chat_row, make_tiny_recipe, write_rows
from tunesmith.core.errors import GateError
from tunesmith.core.types import Json
from tunesmith.session import inputs, planner, session
from tunesmith.session.session import open_session
from tunesmith.train.preflight import run_preflight

WRITTEN = "{{ '<|start|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
PLAIN = "{% for m in messages %}" + WRITTEN + "{% endfor %}" + ASKED
DATED = "{{ strftime_now('%Y') }}" + PLAIN
SYSTEM_LAST = (  # nowhere if an answer follows
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>' }}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{{ m.content + '>' }}{% elif m.role == 'assistant' %}"
    "{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # answers lose their first word once another turn follows
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "{{ '<|start|>assistant\\n' + m.content.split(' ')[-1] + '<|end|>\\n' }}{% else %}"
    + WRITTEN
    + "{% endif %}"
    "{% endfor %}" + ASKED
)
PAIR: Json = {"prompt": "one?", "chosen": "it is one", "rejected": "it is two"}
TURNS: Json = {
    "messages": [
        *make_chat_row("one?", "it is")["messages"],
        *make_chat_row("two?", "it was")["messages"],
    ]
}


def compared(
    model: Path, folder: Path, template: str, rows: list[Json], **changed: Any
) -> tuple[list[bool], str]:
    """Which rows were compared as a whole, and what the proof says of them."""
    (folder / "template.jinja").write_text(template)
    data = str(write_rows(folder / "rows.jsonl", rows))
    run_inputs = inputs.load_inputs(
        make_tiny_recipe(
            model, folder, data=data, chat_template=str(folder / "template.jinja"), **changed
        )
    )
    bench = open_session(planner.make_plan(run_inputs), run_inputs)
    verdicts = {verdict.kind: verdict for verdict in run_preflight(bench.model, bench.samples)}
    return [actual.is_full_row for actual in bench.samples.token_id_checks], verdicts[
        "token ids match apply_chat_template"
    ].evidence


@pytest.mark.parametrize(
    ("template", "row", "full", "changed"),
    [
        (DATED, make_chat_row("one?", "it is"), True, {}),
        (SYSTEM_LAST, make_chat_row("one?", "it is", "Be brief."), False, {}),
        (FORGETFUL, TURNS, False, {}),
        (DATED, PAIR, True, {"stage": "preference"}),
    ],
    ids=["dated", "served otherwise", "a document a turn", "pairs"],
)
def test_rows_and_prompts_are_compared(
    tiny_folder: Path,
    tmp_path: Path,
    template: str,
    row: Json,
    full: bool,
    changed: dict[str, Any],
) -> None:
    actual, messages = compared(tiny_folder, tmp_path, template, [row] * 3, **changed)
    assert actual == [full] * 3
    assert messages.endswith("included" if full else "only the prompts of 3")


def test_what_looks_like_a_control_token_is_not_compared(tiny_folder: Path, tmp_path: Path) -> None:
    actual, messages = compared(
        tiny_folder, tmp_path, DATED, [make_chat_row("one <|end|>?", "it is")] * 3
    )
    assert actual == []
    assert messages.startswith("not checked: ")


@pytest.mark.parametrize(
    ("template", "row"), [(PLAIN, make_chat_row("one?", "it is")), (FORGETFUL, TURNS)]
)
def test_other_ids_are_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, row: Json
) -> None:
    """As from a tokenizer class that builds another tokenizer than the file holds."""
    stock = session.encode_stock_conversation
    monkeypatch.setattr(
        session,
        "encode_stock_conversation",
        lambda *provided, **more: [*stock(*provided, **more)[:-1], 0],
    )
    with pytest.raises(GateError, match="token ids differ from apply_chat_template"):
        compared(tiny_folder, tmp_path, template, [row] * 3)


def test_another_date_is_not_compared(tiny_folder: Path, tmp_path: Path) -> None:
    dated = DATED.replace("%Y", "%f")  # the plan has no microseconds
    assert compared(tiny_folder, tmp_path, dated, [make_chat_row("one?", "it is")] * 3)[
        1
    ].startswith("not checked: ")
