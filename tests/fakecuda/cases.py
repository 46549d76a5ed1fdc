"""What runs on a GPU that is not there: each case is a function that returns what it recorded.

    python cases.py FOLDER     builds the shim in FOLDER, runs all cases, writes FOLDER/results.json

The real code runs: training loop, losses, optimizer, checkpoints, preflight, generation,
likelihoods. The models are tiny, but for those of large_models.py."""

import copy
import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from shim import build_shim, load_shim

    problem = build_shim(Path(sys.argv[1]))
    if problem:
        (Path(sys.argv[1]) / "results.json").write_text(json.dumps({"problem": problem}))
        sys.exit()
    load_shim(Path(sys.argv[1]))
    # its kernels are no operators, which fake tensors need: recurrent layers take the torch path
    sys.modules["fla"] = None  # pyright: ignore[reportArgumentType]

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from fake_models import (
    BF16,
    PLAIN,
    get_model,
    make_loop,
    make_model,
    make_network,
    record_step,
    take_step,
)
from flash_on_cpu import layout_of
from large_models import FEWER, LARGE_MODELS, MORE, name_case, train_large
from plan_configs import make_config
from recorder import Record, fake_gpu, recording
from tiny_models import (
    CONFIGS,
    LORA,
    SIZES,
    make_branching_documents,
    make_tiny_documents,
)
from tunesmith.core.errors import GateError, TunesmithError
from tunesmith.core.ranks import Ranks
from tunesmith.core.types import Document, GenerationRequest, PackLayout
from tunesmith.evaluate.kl_divergence import AdapterDisabled, cache_states, compute_kl
from tunesmith.evaluate.loglikelihood import compute_mean_states, compute_nll
from tunesmith.model.adapters import METHODS
from tunesmith.model.causal_lm import compute_stock_logits, load_network, wrap_model
from tunesmith.model.flash_attention import attend_gathered, attend_merged
from tunesmith.model.generation.engine import generate
from tunesmith.model.hub.families import UNIFORM_CLASSES
from tunesmith.model.kernels import ops
from tunesmith.model.quantization import load_quantized
from tunesmith.model.save import STATE_FILE
from tunesmith.session.preflight_probe import (
    PreflightSamples,
    choose_documents,
    choose_positions,
    choose_sharing_documents,
)
from tunesmith.session.session import set_deterministic
from tunesmith.train.kto import measure_kl
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.optimizer import restore_moments
from tunesmith.train.preflight import run_preflight
from tunesmith.train.update_norms import (
    compute_update_ratios,
    compute_weight_norms,
)
from wide_configs import make_wide_config


def train(
    config: PreTrainedConfig = PLAIN,
    documents: Sequence[Document] = (),
    plan: dict[str, Any] | None = None,
    **model_settings: Any,
) -> Record:
    """Record a step."""
    loop = make_loop(get_model(config, **model_settings), documents, **(plan or {}))
    return record_step(loop)


def make_sides(*sides: str, reference: float | None = None) -> list[Document]:
    """Return the documents with these sides, in turn."""
    documents: list[Document] = []
    for index, document in enumerate(make_tiny_documents((9, 17, 5, 21))):
        side: Any = sides[index % len(sides)]
        weights_L = np.ones_like(document.weights_L)
        weights_L[:3] = 0
        # both answers of a pair belong to one row
        name = f"rows:{index // 2}"
        documents.append(
            dataclasses.replace(
                document, id=name, side=side, weights_L=weights_L, reference_logp=reference
            )
        )
    return documents


class PretendedRanks(Ranks):
    """Rank 0 of eight, in a process group that sends nothing."""

    def __init__(self) -> None:
        super().__init__(rank=0, world=8)
        self._group = distributed.group.WORLD

    def send(self, command: str, **arguments: Any) -> None:
        """Send no command: nobody receives it."""


def train_on_ranks(**model_settings: Any) -> Record:
    """Record a step of rank 0 up to its update, which stand-ins for the sums leave out."""
    documents = make_tiny_documents(range(10, 26))
    loop = TrainingLoop(
        get_model(**model_settings),
        lambda _: list(documents),
        make_config(),
        steps=3,
        ranks=PretendedRanks(),
    )
    return record_step(loop)


def train_kto(*, stored: bool) -> Record:
    reference = -9.0 if stored else None
    documents = make_sides("desirable", "undesirable", reference=reference)
    mismatched = make_sides("mismatched", reference=reference)
    plan = {"loss": "kto", "beta": 0.1}
    return train(documents=[*documents, *mismatched], plan=plan)


def train_pairs(loss: str, reference: float | None = None, **plan: Any) -> Record:
    pairs = make_sides("chosen", "rejected", reference=reference)
    settings = {"loss": loss, "beta": 0.1, "gamma": 0.1, "nll_coefficient": 0.2}
    return train(documents=pairs, plan=settings | plan)


def train_banned() -> Record:
    documents = make_sides("banned", "")
    return train(documents=documents, plan={"ban_coefficient": 1.0})


def train_several_packs() -> Record:
    return train(plan={"pack_length": 40})


def prove(config: PreTrainedConfig = PLAIN) -> Record:
    """Run preflight. Its controls cannot be detected with stand-ins, and come last."""
    documents = choose_documents(make_tiny_documents((20, 9, 33, 14)), None)
    logits = []
    with recording():  # which is faster
        network = make_network(config)
        for document in documents:
            tokens = document.tokens_L[:-1].tolist()
            logits.append(compute_stock_logits(network, tokens, choose_positions(document)))
        METHODS["lora"](network, LORA)
        model = wrap_model(network, BF16, "varlen")
    sharing = choose_sharing_documents(make_branching_documents())
    samples = PreflightSamples(documents, tuple(logits), frozenset({2}), sharing_documents=sharing)
    refusal = pytest.raises(GateError, match="did not detect an injected fault")
    with recording() as record, refusal:
        run_preflight(model, samples)
    return record


def answer(
    num_prompts: int, *, shared: int = 0, config: PreTrainedConfig = PLAIN, **settings: Any
) -> Record:
    """Generate answers to prompts that begin with the same `shared` tokens."""
    model = get_model(config)
    model.network.eval()
    start = tuple(range(3, 3 + shared))
    requests = []
    for index in range(num_prompts):
        prompt = (*start, *(10 + index,) * (5 + index))
        requests.append(GenerationRequest(prompt, max_new_tokens=4, **settings))
    with recording() as record:
        outputs = list(generate(model, requests, decode=str, end_ids=(2,), batch_size=2))
    assert len(outputs) == num_prompts
    return record


def measure(share: bool) -> Record:
    """Measure likelihoods, hidden states and divergences."""
    model = get_model()
    model.network.eval()
    documents = make_branching_documents()
    with recording() as record:
        results = list(compute_nll(model, documents, 4096, share=share))
        list(compute_mean_states(model, documents, 4096))
        bases = (AdapterDisabled(), cache_states(model, documents, 4096))
        divergences = [
            list(compute_kl(model, documents, 4096, base, share=share)) for base in bases
        ]
    assert {len(results), *map(len, divergences)} == {len(documents)}
    return record


def measure_norms() -> Record:
    """Measure what a probe of the guard does of the last update of adapters."""
    model = get_model()
    loop = make_loop(model)
    with recording() as record:
        take_step(loop)
        norms = compute_weight_norms(model.network)
        updates = compute_update_ratios(model.network, loop.optimizer, norms)
    assert norms.keys() == updates.keys()
    return record


def measure_mismatched() -> Record:
    model = get_model()
    with recording() as record:
        measure_kl(model, make_sides("mismatched"), 4096)
    return record


def resume(saved: dict[str, Tensor], *, steps_before: int) -> Record:
    """Restore the moments that a run on a CPU saved, into a run that has taken so many steps."""
    loop = make_loop(get_model())
    with recording():
        for _ in range(steps_before):
            take_step(loop)
    for name, parameter in loop.parameters.items():
        moments = {moment: saved[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")}
        restore_moments(loop.optimizer, parameter, moments, updates=1)
    record = record_step(loop)
    for parameter in loop.parameters.values():
        state = loop.optimizer.state[parameter]
        assert {tensor.device.type for tensor in state.values()} == {"cuda"}, state
    return record


def save_on_cpu(folder: Path) -> dict[str, Tensor]:
    """Return the checkpoint of a run of real tensors."""
    network: Any = AutoModelForCausalLM.from_config(copy.deepcopy(PLAIN), dtype=BF16)
    network.eval().requires_grad_(False)
    METHODS["lora"](network, LORA)
    loop = make_loop(wrap_model(network, BF16, "sdpa"))
    take_step(loop)
    folder.mkdir()
    loop.save(folder)
    return load_file(folder / STATE_FILE)


# of a case, which the others go on without
ERRORS = (
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TunesmithError,
    TypeError,
    ValueError,
)
# (shared prefix, answers) of attention; each length is of tokens
SHARED_LAYOUTS = {
    "short answers": layout_of((1000, *(50,) * 40), (-1, *(0,) * 40)),
    "long answers": layout_of((50, *(300,) * 20), (-1, *(0,) * 20)),
    "pairs": layout_of((600, 60, 60) * 10, tuple(n for i in range(10) for n in (-1, 3 * i, 3 * i))),
    "a conversation": layout_of((600, 60, 60), (-1, 0, 1)),
}


def attend_shared(attend: Callable[..., Tensor], layout: PackLayout) -> Record:
    """Record attention of a layer of 8B, forward and backward."""
    q, k, v, dout = (
        torch.zeros(layout.num_tokens, n, 128, dtype=BF16, device="cuda", requires_grad=True)
        for n in (32, 8, 8, 32)
    )
    with recording() as record:
        out = attend(q, k, v, layout, scale=0.1)
        torch.autograd.grad(out, (q, k, v), dout)
    record.step_kernels = record.num_kernels
    record.step_bytes = record.moved_bytes
    return record


def check_results() -> Record:
    """Compare what is run directly with FakeTensorMode."""
    model = make_model()
    with recording(is_checked=True) as record:
        take_step(make_loop(model))
    return record


def mix_devices() -> Record:
    with recording() as record:
        torch.zeros(3, device="cuda") + torch.zeros(3)
    return record


def index_from_host() -> Record:
    with recording() as record:
        torch.zeros(3, device="cuda")[torch.tensor([0, 2])]
    return record


def select_by_values() -> Record:
    with recording() as record:
        values = torch.zeros(3, device="cuda")
        values[values > 0]
    return record


def read_twice() -> Record:
    with recording() as record:
        values = torch.zeros(3, device="cuda")
        values.tolist()
        float(values.sum())
    return record


def copy_twice() -> Record:
    with recording() as record:
        torch.zeros(3).to("cuda")
        torch.zeros(3).to("cuda", non_blocking=True)
    return record


def count_one_add() -> Record:
    """One kernel of 12 bytes, beside the input, which is from before."""
    values = torch.zeros(3, device="cuda")
    with recording() as record:
        record.saved_bytes = (values + 1).untyped_storage().nbytes()
        record.step_kernels = record.num_kernels
        record.step_seconds = record.seconds
    return record


def multiply(columns: int) -> Record:
    a = torch.zeros(2048, 2048, dtype=BF16, device="cuda")
    b = torch.zeros(2048, columns, dtype=BF16, device="cuda")
    with recording() as record:
        _ = a @ b
    record.step_seconds = record.seconds
    return record


def attend_to(x: Tensor) -> Record:
    with recording() as record:
        attend_gathered(x, x, x, layout_of((8,)), scale=0.1)
    return record


def attend_wide() -> Record:
    return attend_to(torch.zeros(8, 2, 64, device="cuda"))


def attend_misaligned() -> Record:
    return attend_to(torch.zeros(8, 2, 72, dtype=BF16, device="cuda")[..., 4:68])


def mix_strided() -> Record:
    x = torch.zeros(3, 8, 16, device="cuda").transpose(0, 1)
    with recording() as record:
        ops.mix_rows(x, x, torch.zeros(8, 3, device="cuda"))
    return record


def run_deterministic(case: Callable[[], Record]) -> Record:
    set_deterministic(True)
    try:
        return case()
    finally:
        set_deterministic(False)


def sum_floats() -> Record:
    with recording() as record:
        torch.zeros(3, device="cuda").cumsum(0)
    return record


# faults that the recorder must see, and counts that are known
CONTROLS: dict[str, Callable[[], Record]] = {
    "mixed devices": mix_devices,
    "an index on the host": index_from_host,
    "a shape that depends on values": select_by_values,
    "two reads": read_twice,
    "one kernel": count_one_add,
    "two copies": copy_twice,
    "a product, square": partial(multiply, 2048),
    "a product, skinny": partial(multiply, 16),
    "results": check_results,
    "a sum in any order": partial(run_deterministic, sum_floats),
    "flash attention in fp32": attend_wide,
    "flash attention, misaligned": attend_misaligned,
    "a strided kernel": mix_strided,
}


def load(folder: Path, load: Callable[..., Any]) -> Record:
    """Load a model folder onto the device."""
    with recording() as record:
        network = load(folder, BF16, "cuda")
    tensors = [*network.parameters(), *network.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    return record


def save_model(folder: Path) -> Path:
    network: Any = AutoModelForCausalLM.from_config(copy.deepcopy(PLAIN), dtype=BF16)
    network.save_pretrained(folder)
    return folder


# a config of each type that models have
FAMILY_CONFIGS = dict(CONFIGS)
PLAIN_TYPES = UNIFORM_CLASSES.keys() - {config.model_type for config in CONFIGS.values()}
for model_type in sorted(PLAIN_TYPES):
    sizes = SIZES | {"hidden_size": 64, "head_dim": 16}
    FAMILY_CONFIGS[model_type] = AutoConfig.for_model(model_type, **sizes)
LATENT = make_wide_config("minicpm3")  # heads that flash attention takes
FULL = {"method": "full"}
NEW_TOKENS = {
    "add_tokens": {"<a>": 97, "<b>": 98},
    "new_rows_modules": ("embed_tokens", "lm_head"),
}
BRANCHING = make_branching_documents()
SHARED = {"share_prefixes": True}

CASES: dict[str, Callable[[], Record]] = {
    "sft": train,
    "sft in several packs": train_several_packs,
    "cpt": partial(train, documents=make_sides("")),
    "label smoothing": partial(train, plan={"label_smoothing": 0.1}),
    "dpo with stored references": partial(train_pairs, "dpo", -9.0),
    "dpo with the adapter off": partial(train_pairs, "dpo"),
    "orpo": partial(train_pairs, "orpo"),
    "simpo": partial(train_pairs, "simpo"),
    "dpo with shared prefixes": partial(train_pairs, "dpo", share_prefixes=True),
    "kto": partial(train_kto, stored=True),
    "banned answers": train_banned,
    "shared prefixes": partial(train, documents=BRANCHING, plan=SHARED),
    "latent attention": partial(train, LATENT),
    "latent attention with shared prefixes": partial(train, LATENT, BRANCHING, SHARED),
    "dora": partial(train, use_dora=True),
    "rslora with dropout": partial(train, use_rslora=True, lora_dropout=0.1),
    "qlora": partial(train, method="qlora"),
    "full": partial(train, **FULL),
    "new tokens": partial(train, **NEW_TOKENS),
    "new tokens with a tied head": partial(
        train,
        LlamaConfig(**SIZES | {"head_dim": 64}, tie_word_embeddings=True),
        **NEW_TOKENS | {"new_rows_modules": ("embed_tokens",)},
    ),
    "recomputed MLPs": partial(train, gradient_checkpointing="selective"),
    "recomputed layers": partial(train, gradient_checkpointing="full"),
    "recomputed layers with dropout": partial(
        train, gradient_checkpointing="full", lora_dropout=0.1
    ),
    "recomputed layers, full": partial(train, gradient_checkpointing="full", **FULL),
    "fp32": partial(train, dtype=torch.float32, backend="sdpa"),
    "fp16": partial(train, dtype=torch.float16),
    "fp16 without flash attention": partial(train, dtype=torch.float16, backend="sdpa"),
    "fp32 with shared prefixes": partial(
        train, documents=BRANCHING, plan=SHARED, dtype=torch.float32, backend="sdpa"
    ),
    "dense mask": partial(train, backend="dense_mask"),
    "preflight": prove,
    "answers": partial(answer, 3),
    "answers after a shared prefix": partial(answer, 3, shared=20),
    "sampled answers": partial(answer, 3, temperature=0.7, top_p=0.9, top_k=20, min_p=0.05),
    "likelihoods": partial(measure, share=False),
    "likelihoods with shared prefixes": partial(measure, share=True),
    "mismatched answers": measure_mismatched,
    "norms": measure_norms,
}
LARGE_CASES: dict[str, Callable[[], Record]] = {}
for large_name, large_model in LARGE_MODELS.items():
    for policy in large_model.policies:
        for num_layers in (FEWER, MORE):
            name = name_case(large_name, policy, num_layers)
            LARGE_CASES[name] = partial(train_large, large_name, num_layers, policy)
CASES |= LARGE_CASES
for layout_name, shared_layout in SHARED_LAYOUTS.items():
    for way, attend in {"merged": attend_merged, "gathered": attend_gathered}.items():
        CASES[f"attention over {layout_name}, {way}"] = partial(
            attend_shared, attend, shared_layout
        )
for family, family_config in FAMILY_CONFIGS.items():
    CASES[f"family {family}"] = partial(train, family_config, make_tiny_documents((17, 17, 5)))
DETERMINISTIC = ("sft", "sampled answers", "shared prefixes", "family qwen3_5", "family mixtral")
for name in DETERMINISTIC:
    CASES[f"{name}, deterministic"] = partial(run_deterministic, CASES[name])


def run_case(case: Callable[[], Record]) -> dict[str, Any]:
    """Return the record, with the error and its place in the package if there is one."""
    try:
        record = case()
    except Exception as error:  # noqa: BLE001 (reported per case)
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{f.filename}:{f.lineno}" for f in frames if "/tunesmith/" in f.filename]
        message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return {
            "error": f"{message} at {places[-1].partition('/tunesmith/')[2] if places else '?'}"
        }
    return {
        "error": "",
        "reads": record.reads,
        "uploads": record.uploads,
        "waits": record.waits,
        "step_kernels": record.step_kernels,
        "step_bytes": record.step_bytes,
        "step_seconds": record.step_seconds,
        "saved_bytes": record.saved_bytes,
        "peak_bytes": record.peak_bytes,
        "kernels": dict(record.kernels.most_common()),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    saved = save_on_cpu(folder / "checkpoint")
    CASES["resume"] = partial(resume, saved, steps_before=0)
    CASES["rollback"] = partial(resume, saved, steps_before=2)
    model = save_model(folder / "model")
    CASES["weights"] = partial(load, model, load_network)
    CASES["4-bit weights"] = partial(load, model, load_quantized)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    CASES["eight ranks"] = train_on_ranks
    CASES["eight ranks, full"] = partial(train_on_ranks, **FULL)
    with fake_gpu():
        results = {name: run_case(case) for name, case in (CASES | CONTROLS).items()}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
