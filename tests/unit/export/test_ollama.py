from datetime import datetime
from pathlib import Path

import pytest

from tiny_export import CHATML, SYSTEM, save_tokenizer
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.export.ollama import (
    TEMPLATES,
    OllamaTemplate,
    choose_template,
    parse_modelfile,
    render_modelfile,
)

USER: Json = {"role": "user", "content": "1 and 2"}
CUSTOM: Json = {"role": "system", "content": 'Add them.\n  {{ .Role }} "quoted"?'}


def served_for(
    folder: Path, template: str, *conversations: list[Json], cut: str = "smollm"
) -> OllamaTemplate:
    save_tokenizer(folder, cut, template=template)
    renderer = Renderer.from_folder(folder, now=datetime(2026, 1, 2))
    return choose_template(folder / "tokenizer.json", renderer, conversations)


def test_the_default_system_message_of_a_template_is_found(tmp_path: Path) -> None:
    served = served_for(tmp_path, CHATML, [USER])
    assert served == OllamaTemplate(TEMPLATES["ChatML"], SYSTEM, ("<|im_end|>", "<|text|>"))
    assert served.render_prompt([USER]) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n1 and 2<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_system_message_that_all_rows_have(tmp_path: Path) -> None:
    served = served_for(tmp_path, CHATML, [CUSTOM, USER], [CUSTOM, USER])
    assert served.system == CUSTOM["content"]
    assert served.render_prompt([USER]) == served.render_prompt([CUSTOM, USER])
    assert '{{ .Role }} "quoted"?' in served.render_prompt(
        [USER]
    )  # contents are never read as a template


def test_rows_that_disagree_leave_the_default(tmp_path: Path) -> None:
    assert served_for(tmp_path, CHATML, [CUSTOM, USER], [USER]).system == SYSTEM


def test_a_template_without_a_default(tmp_path: Path) -> None:
    template = CHATML.replace(
        CHATML[CHATML.index("{% if loop") : CHATML.index("{% endif %}") + 11], ""
    )
    assert served_for(tmp_path, template, [USER]).system == ""


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m.content +", "m.content | trim + ' ' +"),
        CHATML.replace("<|im_start|>' + m.role", "<|text|>' + m.role"),
        CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"),
    ],
)
def test_a_template_that_renders_otherwise_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(InputError, match="no Ollama template"):
        served_for(tmp_path, template, [USER])


REFUSES_SYSTEM = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_refuses_system_messages_is_compared_without_them(tmp_path: Path) -> None:
    served = served_for(tmp_path, REFUSES_SYSTEM, [USER])
    assert served == OllamaTemplate(TEMPLATES["ChatML"], "", ("<|im_end|>", "<|text|>"))


@pytest.mark.parametrize("turn", ["'<|text|>' + m.role", "'<|im_start|>' + m.role | upper"])
def test_a_template_that_refuses_system_messages_and_renders_otherwise_is_refused(
    turn: str, tmp_path: Path
) -> None:
    template = REFUSES_SYSTEM.replace("'<|im_start|>' + m.role", turn)
    with pytest.raises(InputError, match="no Ollama template"):
        served_for(tmp_path, template, [USER])


def test_a_row_that_the_template_refuses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no system role"):
        served_for(tmp_path, REFUSES_SYSTEM, [CUSTOM, USER], [USER])


def test_rows_with_tools_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the rows contain tool calls"):
        served_for(tmp_path, CHATML, [USER, {"role": "tool", "content": "3"}])


def test_the_file() -> None:
    served = OllamaTemplate(TEMPLATES["ChatML"], 'Be brief.\nSay "no" twice.', ("<|im_end|>",))
    text = render_modelfile(served, "model-f16.gguf", "tiny\nneeds Ollama 0.17.1 or newer")
    assert text == (
        "# tiny\n# needs Ollama 0.17.1 or newer\nFROM ./model-f16.gguf\n"
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
        "{{ end }}"
        '<|im_start|>assistant\n"""\n'
        'SYSTEM """Be brief.\nSay "no" twice."""\nPARAMETER stop "<|im_end|>"\n'
    )
    assert parse_modelfile(text) == served


@pytest.mark.parametrize("system", ['a """ b', 'it ends in "'])
def test_what_the_quotes_cannot_hold_is_refused(system: str) -> None:
    with pytest.raises(InputError, match="cannot quote this system message"):
        render_modelfile(OllamaTemplate("", system, ()), "m.gguf", "")
