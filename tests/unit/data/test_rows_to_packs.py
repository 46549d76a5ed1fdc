"""The whole way of a row with the real renderer: file, data set, check, show, packs, tensors."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check_data
from tunesmith.data.collate import collate
from tunesmith.data.dataset import open_dataset
from tunesmith.data.packing import pack_step
from tunesmith.data.preview import render_preview
from tunesmith.data.sampler import StepSampler, prefetch
from tunesmith.recipe.fields import DataSource

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """A tokenizer with one token a byte, and a ChatML template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(
        BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Renderer.from_folder(folder, now=datetime(2026, 1, 1))


@pytest.fixture
def opened(write, renderer):
    def open_rows(*rows, **options):
        path: Path = write("".join(json.dumps(row) + "\n" for row in rows))
        return open_dataset([DataSource(path=path)], renderer, **options)

    return open_rows


def chat(*contents):
    return {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(contents)
        ]
    }


def test_every_answer_with_its_end_token_arrives_as_targets(opened, renderer):
    dataset = opened(
        chat("a", "one €"), chat("b", "two", "c", "three"), chat("dd", "{}"), chat("e" * 40, "four")
    )
    schedule = StepSampler(len(dataset), 2, 1.0, seed=0)
    steps = prefetch(
        schedule.iter_steps(), lambda step: [dataset.render_row(row)[1] for row in step[1]]
    )
    answers: dict[str, str] = {}
    for prepared in steps:
        for pack in pack_step([document for row in prepared for document in row.documents], 64):
            batch = collate(pack)
            for i, row_id in enumerate(batch.ids):
                answers[row_id] = renderer.decode(batch.targets_S[batch.document_S == i].tolist())
    assert answers == {
        "train.jsonl:1": "one €<|im_end|>",
        "train.jsonl:2": "two<|im_end|>three<|im_end|>",
        "train.jsonl:3": "{}<|im_end|>",
        "train.jsonl:4": "four<|im_end|>",
    }


def test_tokens_are_shown_as_they_are_trained_and_forged_ones_are_told_apart(opened, renderer):
    dataset = opened(chat("<|im_end|> 😀", "ok\n"))
    header, tokens, note = (
        text.plain for text in render_preview(dataset.render_row(0)[1], renderer)
    )
    assert header.startswith("train.jsonl:1  ")
    assert (
        tokens == "◆<|im_start|>user⏎\n<|im_end|>␣😀◆<|im_end|>⏎\n"
        "◆<|im_start|>assistant⏎\n⟦ok⏎\n◆<|im_end|>⟧⏎"
    )
    assert "looks like a control token" in note


def test_the_check_names_forged_control_text_and_losses(opened):
    rows = [chat(f"ask {i}", "yes") for i in range(8)]
    dataset = opened(
        *rows, chat("<|im_start|>system", "no"), chat("x" * 100, "long"), max_length=80
    )
    report = check_data({"data": dataset})["data"]
    findings = {finding.check: (finding.level, finding.rows) for finding in report.findings}
    assert findings == {
        "losses": ("warn", ("train.jsonl:10",)),
        "render": ("warn", ("train.jsonl:9",)),
    }
    assert (report.rows, report.documents, report.dropped) == (10, 9, {"longer than max_length": 1})


def test_completions_become_chats_with_a_template(opened, renderer):
    dataset = opened({"prompt": "2+2?", "completion": "4"})
    (document,) = dataset.render_documents(0)
    assert renderer.decode(document.tokens_L) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )


def test_plain_text_is_trained_from_its_second_token_to_its_end_token(opened, renderer):
    (document,) = opened({"text": "ab"}).render_documents(0)
    assert renderer.decode(document.tokens_L) == "ab<|im_end|>"
    assert document.weights_L.tolist() == [0, 1, 1]
