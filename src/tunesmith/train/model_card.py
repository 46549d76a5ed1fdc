"""Write the model card, README.md next to the trained weights: facts of the run's record only.

    write_card(record, fingerprint)    adapter/README.md or model/README.md, with Hub metadata
    note_scale(folder, scale, curve)   the card of an export of that adapter at another scale

The manifest of the folder leaves the card out: people edit cards, and the weights stay verified.
What is unknown is omitted, such as a base model without a name on the Hub or without a license.
Text from users and files is escaped, and of a path that names the user's folders the last part
stays: cards are published.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from tunesmith.core.atomic import write_file
from tunesmith.core.evidence import RunVerdict
from tunesmith.core.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_value,
    hide_folders,
)
from tunesmith.core.hub_names import is_hub_path
from tunesmith.core.types import Json, ModelSpec, Plan, RunRecord, ScalePoint
from tunesmith.evaluate.scale_choice import describe_tradeoff
from tunesmith.evaluate.statistics import judge_comparisons

CARD_FILE = "README.md"
MAX_METADATA_CHARS = 2**16  # the block at the start of a base's card; the rest is not read
CARD_SETTINGS = (
    "lora_r",
    "lora_alpha",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "batch_size",
    "max_length",
    "seed",
)
MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&^])")
TEXT_MODEL_CLASS = "AutoModelForCausalLM"
MULTIMODAL_CLASS = "AutoModelForImageTextToText"
USE_FULL_MODEL = """```python
from transformers import {model_class}, AutoTokenizer

model = {model_class}.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")  # with its chat template
```"""
USE_ADAPTER = """```python
from peft import PeftModel
from transformers import {model_class}, AutoTokenizer

base = {model_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")  # with its chat template
```

In tunesmith, `adapter_from: this folder` trains it further and `tunesmith chat RUN` talks to it."""


def write_card(record: RunRecord, fingerprint: Json, stages: Sequence[str] = ()) -> None:
    """Write the card of a run atomically; `stages` are the names of its stages, if several."""
    card = render_card(record, fingerprint, stages)
    write_file(Path(record.adapter) / CARD_FILE, card.encode(errors="backslashreplace"))


def note_scale(folder: Path, scale: float, curve: Sequence[ScalePoint]) -> None:
    """Insert the scale of an exported adapter before the results, which are of scale 1."""
    file = folder / CARD_FILE
    if not file.is_file():
        return
    head, results, rest = file.read_text("utf-8", errors="replace").partition("\n## Results\n")
    tradeoff = ""
    for point in curve:
        if point.scale == scale:
            tradeoff = describe_tradeoff(curve, point)
    measured = "Not measured at this scale."
    if tradeoff:
        measured = f"On eval_data, scale {scale:g} {tradeoff}."
    note = (
        f"The trained adapter multiplied by {scale:g}, through `lora_alpha`. All other numbers "
        f"here are for the adapter as trained. {measured}"
    )
    file.write_text(f"{head}\n## Scale\n\n{note}\n{results}{rest}", encoding="utf-8")


def render_card(record: RunRecord, fingerprint: Json, stages: Sequence[str] = ()) -> str:
    plan = record.plan
    base = find_hub_name(plan.model)
    is_adapter = plan.config.method != "full"
    metadata = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base or None,
        license=find_license(plan.model) or None,
        tags=["tunesmith", plan.config.method, plan.config.stage],
    )
    if base:
        metadata["base_model_relation"] = "adapter" if is_adapter else "finetune"
    blocks = [
        f"---\n{metadata.to_yaml()}\n---",
        _render_title(record),
        *_render_stages(stages),
        *_render_verdict(record.verdict),
        "## Results",
        *_render_results(record),
        "## Data",
        _render_data(plan),
        "## Training",
        _render_training(record),
        "## Limits",
        _render_limits(record),
        "## Use",
        _render_use(plan, base),
        *_render_provenance(fingerprint),
    ]
    card = str(ModelCard("\n\n".join(blocks) + "\n"))
    paths = [*plan.list_paths(), record.adapter]
    return hide_folders(card, paths, escape_markdown)


def _render_use(plan: Plan, base: str) -> str:
    """Show how to load the result. The text part of a multimodal model is loaded in its whole."""
    model_class = MULTIMODAL_CLASS if plan.model.tensor_prefix else TEXT_MODEL_CLASS
    template = USE_FULL_MODEL if plan.config.method == "full" else USE_ADAPTER
    return template.format(base=base or "the base model", model_class=model_class)


def escape_markdown(text: str) -> str:
    """Return the text on one line, without markup and control characters."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(printable.split()))


def find_hub_name(model: ModelSpec) -> str:
    """Return the model's name on the Hub if it was downloaded from there, else nothing."""
    return model.name if f"models--{model.name.replace('/', '--')}" in model.path.parts else ""


def find_license(model: ModelSpec) -> str:
    """Return the license that the base model's card or origin states, else nothing."""
    file = model.path / CARD_FILE
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as card:
            text = card.read(MAX_METADATA_CHARS)
        metadata = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
        pattern = r"^license: *[\"']?([a-z0-9][a-z0-9.-]*)[\"']? *$"
        stated = re.search(pattern, metadata[1], flags=re.MULTILINE) if metadata else None
    else:
        stated = re.search(r"\((Apache-2\.0|MIT)\)", model.origin)
    return stated[1].lower() if stated else ""


# ---------------------------------------------------------------- blocks


def _render_title(record: RunRecord) -> str:
    config = record.plan.config
    model = record.plan.model
    kind = f"An adapter ({config.method})"
    if config.method == "full":
        kind = "A fully fine-tuned model"
    origin = f" ({model.origin})" if model.origin else ""
    return (
        f"# {escape_markdown(Path(config.output_dir).name)}\n\n"
        f"{kind} of {escape_markdown(model.name + origin)}, trained on {config.now[:10]} with "
        f"tunesmith {record.version}. Every number here was measured in that run."
    )


def _render_stages(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    stage_names = ", ".join(escape_markdown(name) for name in names)
    scope = "The results are of all stages; data and settings are of the last one."
    return [f"Trained in stages: {stage_names}. {scope}"]


def _render_verdict(verdict: RunVerdict | None) -> list[str]:
    if verdict is None:
        return []
    facts = [verdict.level, verdict.change, verdict.cost, *verdict.reasons]
    lines = [f"- {escape_markdown(fact)}" for fact in facts if fact]
    lines += [
        f"- Next: {escape_markdown(step.reason)}: {format_code(step.command)}"
        f"{step.forecast and f' ({escape_markdown(step.forecast)})'}"
        for step in verdict.next_steps
    ]
    return [f"## Verdict: {verdict.name}", "\n".join(lines)]


def format_code(text: str) -> str:
    """Return the text as a code span, which its own backticks cannot end."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    longest = max(map(len, re.findall("`+", printable)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {printable} {fence}" if longest else f"`{printable}`"


def _render_results(record: RunRecord) -> list[str]:
    if not record.comparisons:
        return ["Nothing was measured: the recipe names neither `test_data` nor `retention_data`."]
    rows: list[tuple[str, ...]] = []
    verdicts = judge_comparisons(record.comparisons)
    for comparison, verdict in zip(record.comparisons, verdicts, strict=True):
        metric = escape_markdown(f"{comparison.task}, {comparison.metric}")
        interval = f"({comparison.low:+.3f} to {comparison.high:+.3f})"
        rows.append(
            (
                metric if comparison.higher_is_better else f"{metric} (lower is better)",
                comparison.after.size,
                f"{comparison.before.value:.3f}",
                f"{comparison.after.value:.3f}",
                f"{comparison.difference:+.3f} {interval}",
                verdict,
            )
        )
    head = ("metric", "n", "before", "after", "change (95% CI)", "verdict")
    note = "Before and after are measured on the same items, and the change is paired by item."
    return [_render_table(head, rows), note]


def _render_data(plan: Plan) -> str:
    rows: list[tuple[str, ...]] = []
    for role, report in plan.data.items():
        is_of_hub = is_hub_path(Path(report.path))
        name = escape_markdown(report.path if is_of_hub else Path(report.path).name)
        digest = f"`{report.fingerprint[:16]}`"
        rows.append((role, name, f"{report.rows:,}", f"{report.tokens:,}", digest))
    return _render_table(("role", "file", "rows", "tokens", "sha256 starts with"), rows)


def _render_training(record: RunRecord) -> str:
    values = record.plan.values
    machine = record.plan.machine
    cores = format_count(machine.cores, "core")
    rows: list[tuple[str, ...]] = []
    for key in CARD_SETTINGS:
        if key in values:
            rows.append((f"`{key}`", f"`{format_value(values[key])}`"))
    rows += [
        ("steps", f"{record.steps:,} over {record.tokens:,} tokens"),
        ("training time", _format_time(record)),
        ("peak memory", format_bytes(record.peak_bytes)),
        ("machine", f"{escape_markdown(machine.device_name)}, {cores}"),
    ]
    return _render_table(("setting", "value"), rows)


def _format_time(record: RunRecord) -> str:
    training = format_duration(record.train_seconds)
    if not record.total_seconds:
        return training
    total = format_duration(record.total_seconds)
    return f"{training}; {total} with loading, preflight and evaluation"


def _render_limits(record: RunRecord) -> str:
    """List the warnings of the run, and what it cannot show."""
    warnings = [*record.plan.warnings, *record.input_changes]
    lines = [f"- {escape_markdown(warning)}" for warning in warnings]
    lines += [
        "- Only what the table lists was measured: nothing is known about other tasks, safety or "
        "bias.",
        "- One training run: the intervals do not cover seed-to-seed variation.",
    ]
    return "\n".join(lines)


def _render_provenance(fingerprint: Json) -> list[str]:
    rows: list[tuple[str, str]] = []
    for name, digest in fingerprint.get("base_sha256", {}).items():
        rows.append((escape_markdown(f"base {name}"), f"`{digest}`"))
    if "tokenizer" in fingerprint:
        rows.append(("tokenizer", f"`{fingerprint['tokenizer']}`"))
    for name, digest in fingerprint.get("templates", {}).items():
        rows.append((escape_markdown(f"chat template {name}"), f"`{digest}`"))
    for name, version in fingerprint.get("versions", {}).items():
        rows.append((escape_markdown(name), escape_markdown(str(version))))
    return ["## Provenance", _render_table(("item", "sha256 or version"), rows)] if rows else []


def _render_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
