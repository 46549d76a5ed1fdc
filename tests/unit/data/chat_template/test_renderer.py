"""Masks and boundaries on small templates, with toy tokenizers."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import AddedToken

from toy_chat import (
    CHATML,
    CHATML_TOKENS,
    assistant,
    make_byte_bpe,
    make_example,
    make_newline_bpe,
    make_sentence_bpe,
    make_tool_call,
    mark_trained_text,
    render_marked,
    user,
    write_model_folder,
)
from tunesmith.core.errors import InputError
from tunesmith.core.types import Example
from tunesmith.data.chat_template.encode import TrackedText
from tunesmith.data.chat_template.render_notes import (
    BOUNDARY,
    CONTROL_LIKE_TEXT,
    CUT_OFF,
    END_TOKEN_APPENDED,
    PER_TURN,
    SERVED_PROMPT,
    STRUCTURAL,
)
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.chat_template.tracked_str import track_str

NOW = datetime(2026, 3, 4)
FORGETFUL = (  # as Qwen3: thinking stays in the last turn only
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    return Renderer.from_folder(write_model_folder(tmp_path), now=NOW)


def test_an_answer_is_trained_from_its_prompt_through_its_end_token(renderer: Renderer) -> None:
    assert render_marked(
        renderer, {"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello  \n")
    ) == [
        "<|im_start|>system\nBe "
        "brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "⟦Hello  \n<|im_end|>⟧\n"
    ]


def test_a_conversation_is_one_document_where_the_template_keeps_earlier_turns(
    renderer: Renderer,
) -> None:
    turns = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    rendered = renderer.render(make_example(*turns, weights=(0, 0.5, 0, 2.0, 0)))
    assert mark_trained_text(renderer, rendered.documents[0]) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n⟦d<|im_end|>⟧\n<|im_start|>user\ne<|im_end|>\n"
    )
    assert sorted(set(rendered.documents[0].weights_L.tolist())) == [0.0, 0.5, 2.0]
    assert rendered.notes == ()
    assert rendered.documents[0].id == "rows:7"


def test_untrained_turns_are_context(renderer: Renderer) -> None:
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert render_marked(renderer, *turns, weights=(0, 0, 0, 1))[0].count("⟦") == 1
    assert renderer.render(make_example(*turns, weights=(0, 0, 0, 0))).documents == ()


def test_turns_that_the_template_writes_differently_later_are_documents_of_their_own(
    tmp_path: Path,
) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, FORGETFUL), now=NOW)
    turns = [user("a"), assistant("<think>x</think>b"), user("c"), assistant("<think>y</think>d")]
    rendered = renderer.render(make_example(*turns))
    assert [mark_trained_text(renderer, document) for document in rendered.documents] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>x</think>b<|im_end|>⟧\n",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>y</think>d<|im_end|>⟧\n",
    ]
    assert PER_TURN in rendered.notes
    assert len(renderer.render(make_example(*turns, weights=(0, 0, 0, 1))).documents) == 1
    first_only = renderer.render(make_example(*turns, weights=(0, 1, 0, 0)))
    assert [mark_trained_text(renderer, document) for document in first_only.documents] == [
        mark_trained_text(renderer, rendered.documents[0])
    ]
    assert first_only.notes == (CUT_OFF, STRUCTURAL)
    same = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert len(renderer.render(make_example(*same)).documents) == 1


# as Mistral's: the system message stands before the last question, and nowhere if an answer follows
SYSTEM_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' }}"
    "{% if loop.last and messages[0].role == "
    "'system' %}{{ messages[0].content + ' ' }}{% endif %}{{ m.content + '[ANSWER]' }}"
    "{% elif m.role == 'assistant' %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be brief:"}


def test_a_prompt_that_is_written_differently_before_an_answer_stands_as_it_is_served(
    tmp_path: Path,
) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, SYSTEM_LAST), now=NOW)
    turns = [SYSTEM, user("one"), assistant("eins"), user("two"), assistant("zwei")]
    rendered = renderer.render(make_example(*turns))
    assert rendered.notes == (PER_TURN, SERVED_PROMPT)
    assert [mark_trained_text(renderer, document) for document in rendered.documents] == [
        "<|im_start|>Be brief: one[ANSWER]⟦eins<|im_end|>⟧",
        "<|im_start|>one[ANSWER]eins<|im_end|><|im_start|>Be brief: two[ANSWER]⟦zwei<|im_end|>⟧",
    ]
    for document, prompt in zip(rendered.documents, (turns[:2], turns[:4]), strict=True):
        served = renderer.encode_prompt(prompt)
        assert tuple(document.tokens_L[: len(served)].tolist()) == served
    together = "<|im_start|>one[ANSWER]⟦eins<|im_end|>⟧<|im_start|>two[ANSWER]⟦zwei<|im_end|>⟧"
    assert render_marked(renderer, *turns[1:]) == [together]


@pytest.mark.parametrize(
    "asked", ["'[ANSWER]' if loop.last else '[SAID]'", "'' if loop.last else '[ANSWER]'"]
)
def test_an_answer_that_does_not_begin_as_it_is_asked_for_is_refused(
    tmp_path: Path, asked: str
) -> None:
    """Also where the prompt is served differently: nobody knows then where the answer begins."""
    renderer = Renderer.from_folder(
        write_model_folder(tmp_path, SYSTEM_LAST.replace("'[ANSWER]'", f"({asked})")), now=NOW
    )
    with pytest.raises(InputError, match=r"prompts for an answer with .* but writes it as"):
        renderer.render(make_example(SYSTEM, user("one"), assistant("eins")))


def test_a_developer_is_the_system_where_a_template_knows_no_other(
    tmp_path: Path, renderer: Renderer
) -> None:
    turns = [{"role": "developer", "content": "Be brief."}, user("one"), assistant("eins")]
    assert render_marked(renderer, *turns)[0].startswith("<|im_start|>system\nBe brief.")
    knows = CHATML.replace("m.role", "('boss' if m.role == 'developer' else m.role)")
    other = Renderer.from_folder(write_model_folder(tmp_path / "other", knows), now=NOW)
    assert render_marked(other, *turns)[0].startswith("<|im_start|>boss\nBe brief.")


def test_prompts_are_the_start_of_documents_token_by_token(renderer: Renderer) -> None:
    turns = [user("  a\n\n"), assistant("b"), user("c <think>"), assistant("<think>d")]
    document = renderer.render(make_example(*turns)).documents[0]
    for until in (1, 3):
        prompt = renderer.encode_prompt(turns[:until])
        assert tuple(document.tokens_L[: len(prompt)].tolist()) == prompt
        assert document.weights_L[len(prompt) - 1] == 0
        assert document.weights_L[len(prompt)] == 1


def test_an_answer_that_would_merge_with_its_prompt_is_kept_apart_as_it_is_served(
    tmp_path: Path,
) -> None:
    renderer = Renderer.from_folder(write_model_folder(tmp_path, base=make_newline_bpe()), now=NOW)
    prompt = renderer.encode_prompt([user("a")])
    assert renderer.encode_text("\n\n") != renderer.encode_text("\n") * 2, (
        "the tokenizer merges line ends"
    )
    rendered = renderer.render(make_example(user("a"), assistant("\nb")))
    assert tuple(rendered.documents[0].tokens_L[: len(prompt)].tolist()) == prompt
    assert mark_trained_text(renderer, rendered.documents[0]).endswith(
        "assistant\n⟦\nb<|im_end|>⟧\n"
    )
    assert BOUNDARY in rendered.notes
    several = renderer.render(make_example(user("a"), assistant("\nb"), user("c"), assistant("d")))
    assert len(several.documents) == 2
    assert (
        renderer.render(
            make_example(
                user("a"), assistant("b"), user("c"), assistant("\nd"), weights=(0, 1, 0, 0)
            )
        ).notes
        == ()
    )


def test_an_end_token_is_appended_where_the_template_writes_none(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '### Q:\\n' + m.content + '\\n\\n' }}"
        "{% else %}{{ '### A:\\n' + m.content + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### A:\\n' }}{% endif %}"
    )
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template), now=NOW)
    rendered = renderer.render(make_example(user("a"), assistant("b"), user("c"), assistant("d")))
    assert [mark_trained_text(renderer, document) for document in rendered.documents] == [
        "### Q:\na\n\n### A:\n⟦b\n\n<|endoftext|>⟧",
        "### Q:\na\n\n### A:\nb\n\n### Q:\nc\n\n### A:\n⟦d\n\n<|endoftext|>⟧",
    ]
    assert set(rendered.notes) == {END_TOKEN_APPENDED, PER_TURN}
    nameless = write_model_folder(tmp_path / "nameless", template, eos_token=None)
    with pytest.raises(InputError, match="the tokenizer has no EOS token"):
        Renderer.from_folder(nameless, now=NOW).render(make_example(user("a"), assistant("b")))


def test_the_first_of_two_closing_tokens_ends_the_answer_if_the_second_only_ends_the_text(
    tmp_path: Path,
) -> None:
    template = CHATML.replace(
        "{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add"
    )
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template), now=NOW)
    assert renderer.decode(renderer.end_ids) == "<|im_end|><|endoftext|>"
    assert render_marked(renderer, user("a"), assistant("b"))[0].endswith(
        "⟦b<|im_end|>⟧\n<|endoftext|>"
    )


def test_tool_calls_are_trained_with_their_scaffolding(tmp_path: Path) -> None:
    template = CHATML.replace(
        "m.content +",
        "m.content + (('<tool_call>' + m.tool_calls[0].function | tojson + '</tool_call>') if "
        "m.tool_calls else '') +",
    )
    tokens = (*CHATML_TOKENS, "<tool_call>", "</tool_call>")
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template, tokens), now=NOW)
    turns = [
        user("a"),
        assistant("", tool_calls=[make_tool_call(x=1)]),
        {"role": "tool", "content": "r"},
        assistant("b"),
    ]
    assert render_marked(renderer, *turns)[0].endswith(
        '⟦<tool_call>{"name": "look", "arguments": {"x": 1}}'
        "</tool_call><|im_end|>⟧\n<|im_start|>tool\nr<|im_end|>\n"
        "<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
    )


@pytest.mark.parametrize(
    ("written", "wanted"), [("a.arguments", '"{}"'), ("a.arguments | tojson", "{}")]
)
def test_arguments_are_given_as_the_template_writes_them(
    tmp_path: Path, written: str, wanted: str
) -> None:
    """As text where it writes text, byte for byte; as an object where it would quote the text."""
    template = CHATML.replace(
        "m.content +", "m.content + ((m.tool_calls[0].function | x) if m.tool_calls else '') +"
    )
    template = template.replace(
        "(m.tool_calls[0].function | x)", written.replace("a.", "m.tool_calls[0].function.")
    )
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template), now=NOW)
    for arguments in ('{"x":  1}', {"x": 1}):
        function = {"name": "look", "arguments": arguments}
        text = render_marked(
            renderer,
            user("a"),
            assistant("", tool_calls=[{"type": "function", "function": function}]),
        )[0]
        exact = wanted == '"{}"' and isinstance(arguments, str)
        assert ('{"x":  1}' if exact else '{"x": 1}') + "<|im_end|>⟧" in text
    if wanted == "{}":
        broken = {
            "{x": "not valid JSON: Expecting property name",
            '{"x": ' + "[" * 500 + "]" * 500 + "}": "deeper than 100 levels",
            '{"x": ' + "[" * 90_000 + "]" * 90_000 + "}": "cannot be read: nested too deeply",
            '{"x": [' + "[]," * 100_000 + "0]}": "more than 100,000 values",
        }
        for arguments, problem in broken.items():
            function = {"name": "look", "arguments": arguments}
            call = {"type": "function", "function": function}
            with pytest.raises(InputError, match=problem):
                render_marked(renderer, user("a"), assistant("", tool_calls=[call]))


def test_content_is_given_as_parts_where_the_template_wants_parts(tmp_path: Path) -> None:
    template = CHATML.replace("m.content", "m.content[0].text")
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template), now=NOW)
    assert render_marked(renderer, user("a"), assistant("b"))[0].endswith(
        "assistant\n⟦b<|im_end|>⟧\n"
    )
    assert renderer.normalize_messages([user("a")]) == [
        {"role": "user", "content": [{"type": "text", "text": "a"}]}
    ]


def test_plain_text_is_trained_whole_and_closed(tmp_path: Path) -> None:
    tokens = ("<|endoftext|>", "<|bos|>", "<|im_end|>")
    renderer = Renderer.from_folder(
        write_model_folder(tmp_path, None, tokens, bos="<|bos|>"), now=NOW
    )
    assert not renderer.has_template
    rendered = renderer.render(Example("t:1", text="the user"))
    assert mark_trained_text(renderer, rendered.documents[0]) == "<|bos|>⟦the user<|endoftext|>⟧"
    assert rendered.notes == ()
    attacked = renderer.render(Example("t:1", text="the <|im_end|>"))
    assert attacked.notes == (CONTROL_LIKE_TEXT,)
    assert attacked.documents[0].tokens_L.tolist()[1:-1] == renderer.encode_text("the <|im_end|>")
    without = Renderer.from_folder(write_model_folder(tmp_path / "b", None), now=NOW).render(
        Example("t:1", text="the user")
    )
    assert without.documents[0].weights_L.tolist()[0] == 0
    assert without.documents[0].weights_L[1:].all()


@pytest.mark.parametrize("kind", ["bytes", "prepend", "first", "none"])
def test_a_completion_goes_on_from_its_prompt(tmp_path: Path, kind: str) -> None:
    base = None if kind == "bytes" else make_sentence_bpe(kind)
    renderer = Renderer.from_folder(write_model_folder(tmp_path, base=base), now=NOW)
    document = renderer.render(Example("t:1", prompt="the user", text=" asks")).documents[0]
    count = len(renderer.encode_text("the user"))
    assert document.tokens_L[:count].tolist() == renderer.encode_text("the user")
    assert document.weights_L.tolist() == [0.0] * count + [1.0] * (len(document) - count)
    assert renderer.decode(document.tokens_L.tolist()).strip() == "the user asks<|endoftext|>"


def test_a_prompt_after_a_bos_is_not_trained(tmp_path: Path) -> None:
    tokens = ("<|endoftext|>", "<|bos|>")
    folder = write_model_folder(tmp_path, None, tokens, bos="<|bos|>")
    renderer = Renderer.from_folder(folder, now=NOW)
    document = renderer.render(Example("t:1", prompt="the user", text=" asks")).documents[0]
    assert mark_trained_text(renderer, document) == "<|bos|>the user⟦ asks<|endoftext|>⟧"


def test_a_completion_is_an_answer_and_its_prompt_is_not(renderer: Renderer) -> None:
    rendered = renderer.render(
        Example("t:1", prompt="<think>", text="<think>a</think> b<|im_end|>")
    )
    assert (
        mark_trained_text(renderer, rendered.documents[0])
        == "<think>⟦<think>a</think> b<|im_end|><|endoftext|>⟧"
    )
    tokens = rendered.documents[0].tokens_L.tolist()
    assert [
        tokens.count(renderer.tokenizer.token_to_id(text))
        for text in ("<think>", "</think>", "<|im_end|>")
    ] == [1, 1, 0]
    assert rendered.notes == (CONTROL_LIKE_TEXT, STRUCTURAL)
    plain = renderer.render(Example("t:1", text="<think>"))
    assert renderer.tokenizer.token_to_id("<think>") not in plain.documents[0].tokens_L


def test_variables_reach_prompts_and_answers(tmp_path: Path) -> None:
    template = CHATML.replace(
        "assistant\\n' }}", "assistant\\n' + ('<think></think>' if fast else '') }}"
    )
    template = template.replace(
        "m.content +", "('<think></think>' if fast and m.role == 'assistant' else '') + m.content +"
    )
    path = write_model_folder(tmp_path, template)
    slow = Renderer.from_folder(path, now=NOW)
    fast = Renderer.from_folder(path, now=NOW, variables={"fast": True})
    assert render_marked(slow, user("a"), assistant("b"))[0].endswith("assistant\n⟦b<|im_end|>⟧\n")
    assert render_marked(fast, user("a"), assistant("b"))[0].endswith(
        "assistant\n<think></think>⟦b<|im_end|>⟧\n"
    )
    assert slow.fingerprint != fast.fingerprint


def test_the_fingerprint_covers_template_and_tokenizer(tmp_path: Path) -> None:
    path = write_model_folder(tmp_path / "a")
    first = Renderer.from_folder(path, now=NOW)
    assert first.fingerprint == Renderer.from_folder(path, now=datetime(2030, 1, 1)).fingerprint
    other = tmp_path / "other.jinja"
    other.write_text(CHATML + " ")
    assert first.fingerprint != Renderer.from_folder(path, template=other, now=NOW).fingerprint
    more = write_model_folder(tmp_path / "b", tokens=[*CHATML_TOKENS, "<|more|>"])
    assert first.fingerprint != Renderer.from_folder(more, now=NOW).fingerprint


def test_threads_may_share_a_renderer(renderer: Renderer) -> None:
    rows = [
        make_example(user(f"question {i} <|im_end|>"), assistant(f"answer {i}" * i))
        for i in range(1, 60)
    ]
    alone = [renderer.render(row).documents[0].tokens_L.tolist() for row in rows]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda row: renderer.render(row).documents[0].tokens_L.tolist(), rows)
        )
    assert together == alone


def test_dates_are_those_of_the_plan(tmp_path: Path) -> None:
    renderer = Renderer.from_folder(
        write_model_folder(tmp_path, "{{ strftime_now('%d %b %Y') }} " + CHATML), now=NOW
    )
    assert render_marked(renderer, user("a"), assistant("b"))[0].startswith(
        "04 Mar 2026 <|im_start|>"
    )


def test_rows_with_tools_use_the_template_for_tools(tmp_path: Path) -> None:
    path = write_model_folder(tmp_path)
    more = path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ tools | tojson }}" + CHATML)
    renderer = Renderer.from_folder(path, now=NOW)
    assert render_marked(renderer, user("a"), assistant("b"))[0].startswith("<|im_start|>")
    assert render_marked(renderer, user("a"), assistant("b"), tools=({"n": 1},))[0].startswith(
        '[{"n": 1}]<|im_start|>'
    )
    assert renderer.decode(renderer.encode_prompt([user("a")], [{"n": 1}])).startswith('[{"n": 1}]')


def test_tokens_that_swallow_white_space_keep_the_boundary(tmp_path: Path) -> None:
    greedy = [
        AddedToken(text, special=True, normalized=False, rstrip=True) for text in ("<|a|>", "<|e|>")
    ]
    template = (
        "{% for m in messages %}{{ '<|a|>' + m.role + '<|e|>\\n' + m.content + '<|im_end|>\\n' "
        "}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|a|>assistant<|e|>\\n' }}{% endif %}"
    )
    renderer = Renderer.from_folder(
        write_model_folder(tmp_path, template, ["<|endoftext|>", "<|im_end|>", *greedy]), now=NOW
    )
    prompt = renderer.encode_prompt([user("a")])
    for answer in ("b", "  b"):
        document = renderer.render(make_example(user("a"), assistant(answer))).documents[0]
        assert tuple(document.tokens_L[: len(prompt)].tolist()) == prompt
        assert (
            mark_trained_text(renderer, document)
            == "<|a|>user<|e|>a<|im_end|>\n<|a|>assistant<|e|>⟦b<|im_end|>⟧\n"
        )


BARE = (
    "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def test_an_answer_may_be_all_that_stands_behind_its_prompt(tmp_path: Path) -> None:
    """Nothing of the template is in the answer, not even an end token."""
    renderer = Renderer.from_folder(write_model_folder(tmp_path, BARE), now=NOW)
    rendered = renderer.render(make_example(user("one"), assistant("eins")))
    assert mark_trained_text(renderer, rendered.documents[0]).startswith("Q: oneA: ⟦eins")


def test_an_answer_in_place_of_its_prompt_is_refused(tmp_path: Path) -> None:
    """Its text looks like the generation prompt, and nothing of it would be trained."""
    merged = BARE.replace("'A: ') + m.content", "'') + m.content + '<|im_end|>'")
    renderer = Renderer.from_folder(write_model_folder(tmp_path, merged), now=NOW)
    with pytest.raises(InputError, match="does not write message 2"):
        renderer.render(make_example(user("one"), assistant("A: ")))


def test_a_question_that_an_answer_removes_is_refused_with_both_texts(tmp_path: Path) -> None:
    head = "A conversation of two people who know each other: "
    dropped = head + BARE.replace("+ m.content", "+ (m.content if loop.last else '')")
    dropped = dropped.replace("('Q: ' if m.role == 'user'", "('' if m.role == 'user'")
    renderer = Renderer.from_folder(write_model_folder(tmp_path, dropped), now=NOW)
    with pytest.raises(InputError) as caught:
        renderer.render(make_example(user("x" * 99), assistant("y" * 99)))
    shown = head[-20:]
    assert caught.value.message == (
        f"the chat template prompts for an answer with '{shown}{'x' * 40}', "
        f"but writes it as '{shown}A: {'y' * 37}'"
    )


def test_a_control_token_that_normalization_merges_with_its_text_is_refused(tmp_path: Path) -> None:
    """NFC makes one character of > and a combining stroke."""
    base = json.loads(make_byte_bpe()) | {"normalizer": {"type": "NFC"}}
    template = "{% for m in messages %}{{ '<end>' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}<end>{% endif %}"
    tokens = (AddedToken("<end>", special=True, normalized=True), "<|im_end|>")
    folder = write_model_folder(tmp_path, template, tokens, base=json.dumps(base))
    renderer = Renderer.from_folder(folder, now=NOW)
    fine = renderer.render(make_example(user("one"), assistant("eins")))
    trained = mark_trained_text(renderer, fine.documents[0])
    assert trained == "<end>one<|im_end|><end>⟦eins<|im_end|>⟧"
    with pytest.raises(InputError, match="normalization changes the added token '<end>'"):
        renderer.render(make_example(user("\u0338one"), assistant("eins")))


def test_a_run_that_starts_its_document_is_marked_for_the_batch(renderer: Renderer) -> None:
    text = TrackedText(track_str("the user<|im_end|>asks"), renderer.tokenizer, ())
    assert list(text.iter_runs()) == [("the user", True), ("asks", False)]
    assert list(text.iter_runs(cut=4)) == [("the ", True), ("asks", False)]


def test_the_first_answer_that_cannot_be_trained_is_named(tmp_path: Path) -> None:
    """Not a later message that the template refuses, too."""
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
    template += "{% endif %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    renderer = Renderer.from_folder(write_model_folder(tmp_path, template), now=NOW)
    turns = [
        user("a"),
        assistant("b", tool_calls=[make_tool_call(x=1)]),
        {"role": "tool", "content": "c"},
    ]
    with pytest.raises(InputError, match="does not write the tool calls"):
        renderer.render(make_example(*turns))
    with pytest.raises(InputError, match="no tools"):
        renderer.render(make_example(user("a"), assistant("b"), turns[2]))
