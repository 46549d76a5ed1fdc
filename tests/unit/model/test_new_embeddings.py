"""Rows of new tokens: their initial value, their gradient against the stock model, and PEFT reading
what is saved."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tiny_models import (
    LORA,
    VOCABULARY,
    collate_documents,
    compute_max_difference,
    compute_step_gradients,
    make_tiny_documents,
    make_tiny_network,
)
from tunesmith.core.errors import InputError
from tunesmith.core.types import Batch, Document, NewToken
from tunesmith.model.adapters import METHODS, get_trainable_parameters, scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM, load_network, wrap_model
from tunesmith.model.hub.adapter_config import read_adapter
from tunesmith.model.hub.validate import read_headers
from tunesmith.model.lm_head import compute_target_losses
from tunesmith.model.merge import (
    iter_merged_tensors,
    merge_headers,
    read_loras,
    read_token_rows,
    write_merged_weights,
)
from tunesmith.model.new_embeddings import collect_new_rows, find_embeddings, init_new_rows
from tunesmith.model.save import load_adapter, save_adapter, save_config, save_model
from tunesmith.model.target_modules import EMBEDDINGS
from tunesmith.plan.new_tokens import OTHER_EMBEDDINGS
from tunesmith.train.losses import sum_weights
from tunesmith.train.optimizer import make_optimizer, step_optimizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's
FAMILIES = [
    "llama",
    "llama-tied",
    "qwen3",
    "gemma3",
    "granite",
    "cohere",
]  # gemma3 scales what it looks up
PATHS = {"model.embed_tokens": "model.embed_tokens.stock"}  # ours stands around the stock one
PLACES = {"grown": VOCABULARY, "spare": VOCABULARY - 2}


def tokens_from(first: int) -> list[NewToken]:
    return [NewToken("<a>", first, (5, 9, 11)), NewToken("<b>", first + 1, (7,))]


def settings_of(network: PreTrainedModel, tokens: Sequence[NewToken]) -> dict[str, Any]:
    modules = [path.rpartition(".")[2] for path in find_embeddings(network)]
    return LORA | {
        "add_tokens": {token.text: token.id for token in tokens},
        "new_rows_modules": modules,
    }


def started(family: str, first: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a stock network with the tokens."""
    network = make_tiny_network(family, dtype)
    init_new_rows(network, tokens_from(first))
    return network


def adapted(
    family: str, first: int, dtype: torch.dtype = torch.float32, *, moved: bool = True
) -> PackedCausalLM:
    """Return a wrapped model with an adapter and rows that are not at their start."""
    network = started(family, first, dtype)
    METHODS["lora"](network, settings_of(network, tokens_from(first)))
    generator = torch.Generator().manual_seed(1)
    for parameter in get_trainable_parameters(network).values() if moved else ():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrap_model(network, dtype)


def documents_with(first: int) -> list[Document]:
    """Return documents with new tokens as input and target, adjacent and at the start."""
    documents = make_tiny_documents()
    for index, document in enumerate(documents):
        tokens_L = document.tokens_L
        tokens_L[tokens_L >= first] = 3
        if index != 1:
            tokens_L[index % 3 : -1 : 3] = first
            tokens_L[2:-1:7] = first + 1
    return documents


@torch.no_grad()
def logits(model: PackedCausalLM, batch: Batch) -> Tensor:
    return model.head.compute_logits(model.compute_hidden(batch))


@torch.no_grad()
def their_logits(network: torch.nn.Module, document: Document) -> Tensor:
    tokens = torch.from_numpy(document.tokens_L[:-1]).long()[None]
    return network(input_ids=tokens, use_cache=False).logits[
        0, collate_documents([document]).positions_S
    ]


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_row_starts_as_the_mean_of_its_pieces(family: str, placement: str) -> None:
    stock, first = make_tiny_network(family), PLACES[placement]
    network = started(family, first)
    assert network.config.vocab_size == max(VOCABULARY, first + 2)
    assert not list(get_trainable_parameters(network))
    for path, module in find_embeddings(network).items():
        before = stock.get_parameter(f"{path}.weight")
        assert torch.equal(module.weight[:first], before[:first]), "old rows to the bit"
        assert torch.equal(module.weight[first], before[[5, 9, 11]].mean(0))
        assert torch.equal(module.weight[first + 1], before[7])
    assert len(find_embeddings(network)) == (1 if family == "llama-tied" else 2)


def test_without_new_tokens_nothing_is_touched() -> None:
    network, stock = make_tiny_network(), make_tiny_network()
    init_new_rows(network, [])
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), stock.parameters(), strict=True)
    )


def test_a_new_token_is_no_likelier_than_its_pieces() -> None:
    """Hewitt's bound: exp(h . mean) is at most the mean of exp(h . piece)."""
    network, document = started("llama", VOCABULARY), make_tiny_documents()[3]
    odds = their_logits(network, document).exp()
    assert (odds[:, VOCABULARY] <= odds[:, [5, 9, 11]].mean(1) * (1 + 1e-6)).all()


def test_rows_are_trained_in_all_matrices_or_none() -> None:
    network = started("llama", VOCABULARY)
    settings = settings_of(network, tokens_from(VOCABULARY)) | {
        "new_rows_modules": ["embed_tokens"]
    }
    with pytest.raises(AssertionError, match="trained together"):
        METHODS["lora"](network, settings)


# ---------------------------------------------------------------- gradients


def stock_gradients(network: PreTrainedModel, documents: Sequence[Document]) -> dict[str, Tensor]:
    """Return the gradients of the full matrices for the step's mean loss, per document, by
    transformers."""
    network.requires_grad_(True)
    total, count = torch.zeros((), dtype=torch.float64), sum_weights(documents)
    for document in documents:
        tokens = torch.from_numpy(document.tokens_L).long()
        out = network(input_ids=tokens[None, :-1], use_cache=False).logits[0]
        losses = cross_entropy(out, tokens[1:], reduction="none")
        total = total + (losses * torch.from_numpy(document.weights_L[1:])).sum()
    (total / count).backward()
    return {path: module.weight.grad for path, module in find_embeddings(network).items()}


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_the_stock_models(family: str, placement: str) -> None:
    """In fp64, over packs of several documents: rows that are looked up, predicted, or both with a
    tied head."""
    first = PLACES[placement]
    documents = documents_with(first)
    model = adapted(family, first, torch.float64, moved=False)
    _, ours = compute_step_gradients(model, documents, 64)
    theirs = stock_gradients(started(family, first, torch.float64), documents)
    rows = {path: ours[f"{PATHS.get(path, path)}.new_rows.rows_KH"] for path in theirs}
    wanted = {path: gradient[first : first + 2] for path, gradient in theirs.items()}
    assert compute_max_difference(rows, wanted) < 5e-6  # transformers' tables and norms are fp32


def test_shared_prefixes_and_separate_losses_have_the_same_gradient() -> None:
    documents = documents_with(VOCABULARY)
    documents += [dataclasses.replace(documents[3]), dataclasses.replace(documents[3])]
    model = adapted("llama-tied", VOCABULARY, torch.float64)
    _, apart = compute_step_gradients(model, documents, 64)
    _, shared = compute_step_gradients(model, documents, 256, share=True)
    assert compute_max_difference(shared, apart) < 1e-9
    batch, count = collate_documents(documents), sum_weights(documents)
    losses_S = compute_target_losses(model.compute_hidden(batch), model.head, batch.targets_S)
    ((losses_S * batch.weights_S).sum() / count).backward()
    each = {
        name: p.grad
        for name, p in get_trainable_parameters(model.network).items()
        if p.grad is not None
    }
    assert compute_max_difference(each, apart) < 1e-9


def test_recomputed_layers_give_the_same_bits() -> None:
    results = []
    for gradient_checkpointing in ("none", "full"):
        network = started("llama", VOCABULARY)
        METHODS["lora"](network, settings_of(network, tokens_from(VOCABULARY)))
        model = wrap_model(network, torch.float32, gradient_checkpointing=gradient_checkpointing)
        model.network.train()
        results.append(compute_step_gradients(model, documents_with(VOCABULARY), 64)[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ---------------------------------------------------------------- training


def take_step(model: PackedCausalLM, documents: Sequence[Document]) -> None:
    parameters = get_trainable_parameters(model.network)
    optimizer = make_optimizer(parameters.values(), weight_decay=0.1)
    _, gradients = compute_step_gradients(model, documents, 64)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    step_optimizer(optimizer, 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_step_moves_the_new_rows_and_no_other(family: str, dtype: torch.dtype) -> None:
    stock, model = (
        started(family, VOCABULARY, dtype),
        adapted(family, VOCABULARY, dtype, moved=False),
    )
    documents = documents_with(VOCABULARY)
    for _ in range(2):
        take_step(model, documents)
    logits(model, collate_documents(documents))
    for path, module in find_embeddings(stock).items():
        rows = collect_new_rows(model.network)[path]
        ours = model.head.weight if path == "lm_head" else model.decoder.embed_tokens.weight
        assert torch.equal(ours[:VOCABULARY], module.weight[:VOCABULARY]), "old rows to the bit"
        assert (rows.rows_KH - rows.start_KH).abs().amax(1).min() > 0.05, "each row has moved"
        assert torch.equal(ours[VOCABULARY:], rows.rows_KH.detach().to(dtype)), (
            "the matrix holds the masters"
        )


def test_without_the_adapter_the_rows_are_as_they_started() -> None:
    model, stock = adapted("llama", VOCABULARY), started("llama", VOCABULARY)
    document = documents_with(VOCABULARY)[3]
    batch, theirs = collate_documents([document]), their_logits(stock, document)
    trained = logits(model, batch)
    with scaled_adapter(model.network, 0):
        torch.testing.assert_close(logits(model, batch), theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, batch), trained)
    assert (trained - theirs).abs().max() > 0.1


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_rows_with_equal_logits(family: str, placement: str, tmp_path: Path) -> None:
    """The stock base without our rows; a matrix that is too short is resized as PEFT users do."""
    first = PLACES[placement]
    model, document = adapted(family, first), documents_with(first)[3]
    expected = logits(model, collate_documents([document]))
    settings = settings_of(started(family, first), tokens_from(first))
    save_adapter(model.network, tmp_path, settings, Path("base-model"))
    base = make_tiny_network(family)
    if placement == "grown":
        base.resize_token_embeddings(first + 2)
    theirs = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(
        their_logits(theirs, document).float(), expected, rtol=1e-5, atol=1e-5
    )

    network = started(family, first)
    METHODS["lora"](network, settings)
    load_adapter(network, tmp_path / "adapter_model.safetensors")
    assert torch.equal(
        logits(wrap_model(network, torch.float32), collate_documents([document])), expected
    )


def saved(family: str, first: int, folder: Path) -> tuple[PackedCausalLM, Path, Path]:
    """Return a model and the folders of its base and adapter."""
    make_tiny_network(family).save_pretrained(folder / "base")
    model = adapted(family, first)
    settings = settings_of(started(family, first), tokens_from(first))
    save_adapter(model.network, folder / "adapter", settings, folder / "base")
    return model, folder / "base", folder / "adapter"


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_merged_rows_are_in_their_matrices(family: str, placement: str, tmp_path: Path) -> None:
    first = PLACES[placement]
    model, base, adapter = saved(family, first, tmp_path)
    changes = {**read_loras(adapter, base), **read_token_rows(adapter, base)}
    merged = tmp_path / "merged"
    merged.mkdir()
    write_merged_weights(base, changes, merged / "model.safetensors")
    save_config(merged, base, max(VOCABULARY, first + 2), is_packed=True)
    network = load_network(merged, torch.float32)
    document = documents_with(first)[3]
    expected = logits(model, collate_documents([document]))
    torch.testing.assert_close(their_logits(network, document), expected, rtol=1e-3, atol=1e-3)
    old = load_file(base / "model.safetensors")
    for name, tensor in load_file(merged / "model.safetensors").items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(tensor[:first], old[name][:first]), name


def test_a_head_that_lies_in_the_file_although_it_is_tied_grows_too(tmp_path: Path) -> None:
    _, base, adapter = saved("llama-tied", VOCABULARY, tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    rows = read_token_rows(adapter, base)
    headers = read_headers(base)
    merged = dict(iter_merged_tensors(headers, rows))
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert merge_headers(headers, rows)["lm_head.weight"].shape == (VOCABULARY + 2, 48)


def test_a_fully_trained_model_has_the_rows_too(tmp_path: Path) -> None:
    make_tiny_network("llama-tied").save_pretrained(tmp_path / "base")
    network = started("llama-tied", VOCABULARY)
    METHODS["full"](network, {})
    model, document = wrap_model(network, torch.float32), documents_with(VOCABULARY)[3]
    expected = logits(model, collate_documents([document]))
    save_model(model.network, tmp_path / "saved", tmp_path / "base", torch.float32)
    theirs = their_logits(load_network(tmp_path / "saved", torch.float32), document)
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- adapters of strangers


def test_rows_from_peft_are_read(tmp_path: Path) -> None:
    base = make_tiny_network("llama")
    base.save_pretrained(tmp_path / "base")
    wish: Any = {"embed_tokens": [95, 96], "lm_head": [95, 96]}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=wish)
    get_peft_model(base, config).save_pretrained(str(tmp_path / "a"))
    assert read_adapter(tmp_path / "a", tmp_path / "base").new_token_ids == (95, 96)
    rows = read_token_rows(tmp_path / "a", tmp_path / "base")
    assert {path: matrix_rows.first_id for path, matrix_rows in rows.items()} == {
        "lm_head": 95,
        "model.embed_tokens": 95,
    }


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            {"embed_tokens": [97, 99], "lm_head": [97, 99]},
            "not consecutive token ids",
        ),
        ({"embed_tokens": [97, True]}, "not consecutive token ids"),
        ("embed_tokens", "not consecutive token ids"),
        ({"q_proj": [97, 98]}, "not consecutive token ids"),
        ({"embed_tokens": [97, 98], "lm_head": [98, 99]}, "not consecutive token ids"),
        ({"embed_tokens": [97, 98]}, r"lm_head\.token_adapter\S+ is not part of a LoRA"),
        (None, r"token_adapter\S+ is not part of a LoRA"),
        ({"embed_tokens": [97], "lm_head": [97]}, r"is F32 \[2, 48\].*must be \[1, 48\]"),
    ],
)
def test_rows_that_are_not_what_the_config_says_are_refused(
    wish: Any, message: str, tmp_path: Path
) -> None:
    _, base, adapter = saved("llama", VOCABULARY, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {
        "trainable_token_indices": wish
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        read_adapter(adapter, base)


def test_the_plan_knows_all_embeddings_of_other_names() -> None:
    assert EMBEDDINGS.keys() == OTHER_EMBEDDINGS
