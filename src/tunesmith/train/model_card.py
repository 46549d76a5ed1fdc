"""The model card: README.md beside the trained weights, with the facts of the run's record and nothing else.

    write_card(record, identity)        adapter/README.md, or model/README.md; valid front matter for the hub
    note_scale(folder, scale, curve)    the card of an export of that adapter at another scale

The manifest of the folder does not list it: people add to a card, and the weights stay as they were sealed. What is not
known is left out: a base without a name on the hub, a licence that nothing states. Words of others are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.atomic import size, write_file
from tunesmith.core.formatting import duration, value_text
from tunesmith.core.types import Json, ModelSpec, Plan, RunRecord, ScalePoint
from tunesmith.evaluate.scale_choice import keeps
from tunesmith.evaluate.significance import verdicts

CARD = "README.md"
SETTINGS = (
    "lora_r",
    "lora_alpha",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "batch_size",
    "max_length",
)
KIND = {"full": "A fully fine-tuned model"}
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&^])")


def write_card(record: RunRecord, identity: Json, stages: Sequence[str] = ()) -> None:
    """Whole or not at all. `stages`: their names, where the record is of several."""
    write_file(Path(record.adapter) / CARD, card(record, identity, stages).encode(errors="backslashreplace"))


def note_scale(folder: Path, scale: float, curve: Sequence[ScalePoint]) -> None:
    """Says in the card of an adapter, if it has one, that it is scaled; before its results, which are of scale 1."""
    file = folder / CARD
    if file.is_file():
        head, results, rest = file.read_text("utf-8", errors="replace").partition("\n## Results\n")
        note = f"\n## Scale\n\n{_scale_words(scale, curve)}\n"
        file.write_text(f"{head}{note}{results}{rest}", encoding="utf-8")


def _scale_words(scale: float, curve: Sequence[ScalePoint]) -> str:
    told = (
        f"The trained adapter times {scale:g}, by `lora_alpha`. All other numbers here are of the adapter as trained."
    )
    measured = [keeps(curve, point) for point in curve if point.scale == scale]
    if not any(measured):
        return f"{told} At this scale nothing was measured in the run."
    return f"{told} On rows by which a scale may be chosen, {scale:g} {measured[0]}."


def card(record: RunRecord, identity: Json, stages: Sequence[str] = ()) -> str:
    head = yaml.safe_dump(_front_matter(record.plan), sort_keys=False, allow_unicode=True)
    blocks = [
        _title(record),
        *_stages(stages),
        *_results(record),
        *_data(record.plan),
        *_method(record),
        *_limits(record),
    ]
    return "\n\n".join([f"---\n{head}---", *blocks, *_use(record.plan), *_provenance(identity)]) + "\n"


def escaped(text: str) -> str:
    """Words of others on one line of Markdown: no mark-up, no control characters."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return SPECIAL.sub(r"\\\1", plain)


def _front_matter(plan: Plan) -> Json:
    adapted, base, licence = plan["method"] != "full", hub_name(plan.model), licence_of(plan.model)
    found: Json = {"library_name": "peft" if adapted else "transformers", "pipeline_tag": "text-generation"}
    if base:
        found |= {"base_model": base, "base_model_relation": "adapter" if adapted else "finetune"}
    if licence:
        found["license"] = licence
    return found | {"tags": ["tunesmith", *dict.fromkeys((str(plan["method"]), str(plan["stage"])))]}


def hub_name(model: ModelSpec) -> str:
    """The base's name on the hub, if it was fetched from there."""
    return model.name if f"models--{model.name.replace('/', '--')}" in model.path.parts else ""


def licence_of(model: ModelSpec) -> str:
    """As the base's own card or origin states it."""
    file = model.path / CARD
    if file.is_file() and (block := re.match(r"---\n(.*?)\n---", file.read_text("utf-8", errors="replace"), re.DOTALL)):
        stated = re.search(r"^license: *[\"']?([a-z0-9][a-z0-9.-]*)[\"']? *$", block[1], flags=re.MULTILINE)
        return stated[1] if stated else ""
    stated = re.search(r"\((Apache-2\.0|MIT)\)", model.origin)
    return stated[1].lower() if stated else ""


# ---------------------------------------------------------------- blocks


def _title(record: RunRecord) -> str:
    plan = record.plan
    kind, name = KIND.get(plan["method"], f"An adapter ({plan['method']})"), Path(plan["output_dir"]).name
    when = f" on {str(plan['now'])[:10]}" if "now" in plan.choices else ""
    origin = f": {escaped(plan.model.origin)}" if plan.model.origin else ""
    return (
        f"# {escaped(name)}\n\n{kind} of {escaped(plan.model.name)}{origin}, trained{when} with tunesmith "
        f"{record.version}. Every number here was measured in that run."
    )


def _stages(names: Sequence[str]) -> Iterator[str]:
    if names:
        told = ", ".join(map(escaped, names))
        yield f"It was trained in stages: {told}. Results are of all of them, data and settings below of the last."


def _results(record: RunRecord) -> Iterator[str]:
    yield "## Results"
    if not record.comparisons:
        yield "Nothing was measured: the recipe named neither `test_data` nor `retention_data`."
        return
    rows = [
        (
            escaped(f"{one.task}, {one.metric}") + ("" if one.higher_is_better else " (lower is better)"),
            str(one.after.n),
            f"{one.before.value:.3f}",
            f"{one.after.value:.3f}",
            f"{one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f})",
            words,
        )
        for one, words in zip(record.comparisons, verdicts(record.comparisons), strict=True)
    ]
    yield _table(("measure", "n", "before", "after", "change, 95% interval", "verdict"), rows)
    yield "Before and after are of the same items, and the change is paired by item."


def _data(plan: Plan) -> Iterator[str]:
    yield "## Data"
    rows = [
        (role, escaped(Path(one.path).name), f"{one.rows:,}", f"{one.tokens:,}", f"`{one.fingerprint[:16]}`")
        for role, one in plan.data.items()
    ]
    yield _table(("role", "file", "rows", "tokens", "sha256 begins with"), rows)


def _method(record: RunRecord) -> Iterator[str]:
    plan, machine = record.plan, record.plan.machine
    yield "## Training"
    rows = [(f"`{key}`", f"`{value_text(plan[key])}`") for key in SETTINGS if key in plan.choices]
    rows += [("`seed`", f"`{plan['seed']}`")] if "seed" in plan.choices else []
    rows.append(("steps", f"{record.steps:,} over {record.tokens:,} tokens"))
    rows.append(("time", duration(record.train_seconds)))
    rows.append(("memory", f"{size(record.peak_bytes)} at most"))
    rows.append(("machine", f"{escaped(machine.device_name)}, {machine.cores} cores"))
    yield _table(("what", "value"), rows)


def _limits(record: RunRecord) -> Iterator[str]:
    """What was not shown, and what the run itself warned of."""
    told = [f"- {escaped(text)}" for text in (*record.plan.warnings, *record.drift)]
    told.append("- Only what the table says was measured. Nothing is known of other tasks, of safety or of bias.")
    told.append("- One training run: how much another seed would differ is not in the intervals.")
    yield "## Limits\n\n" + "\n".join(told)


def _use(plan: Plan) -> Iterator[str]:
    base = hub_name(plan.model) or "the folder of the base"
    yield "## Use"
    if plan["method"] == "full":
        lines = ['model = AutoModelForCausalLM.from_pretrained("this folder")']
    else:
        lines = [
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "this folder")',
        ]
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    imports = imports if plan["method"] == "full" else ["from peft import PeftModel", *imports]
    lines.append(
        'tokenizer = AutoTokenizer.from_pretrained("this folder")  # with the chat template it was trained with'
    )
    yield "```python\n" + "\n".join([*imports, *lines]) + "\n```"
    if plan["method"] != "full":
        yield "In tunesmith, `adapter_from: this folder` goes on training it; `tunesmith chat RUN` talks to its run."


def _provenance(identity: Json) -> Iterator[str]:
    hashes: dict[str, Any] = {f"base {name}": value for name, value in identity.get("base_sha256", {}).items()}
    hashes |= {name: identity[name] for name in ("tokenizer",) if name in identity}
    hashes |= {f"chat template {name}": value for name, value in identity.get("templates", {}).items()}
    versions = [(escaped(name), escaped(str(value))) for name, value in identity.get("versions", {}).items()]
    if hashes or versions:
        yield "## Provenance"
        yield _table(("what", "sha256 or version"), [*((escaped(k), f"`{v}`") for k, v in hashes.items()), *versions])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
