"""The model card: README.md beside the trained weights, with the facts of the run's record and
nothing else.

    write_card(record, identity)        adapter/README.md, or model/README.md; valid front matter for the hub
    note_scale(folder, scale, curve)    the card of an export of that adapter at another scale

The manifest of the folder does not list it: people add to a card, and the weights stay as they were
sealed. What is not known is left out: a base without a name on the hub, a licence that nothing
states. Words of others are escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.atomic import format_bytes, write_file
from tunesmith.core.formatting import format_duration, format_value
from tunesmith.core.types import Json, ModelSpec, Plan, RunRecord, ScalePoint
from tunesmith.evaluate.scale_choice import describe_tradeoff
from tunesmith.evaluate.statistics import judge_comparisons

CARD_FILE = "README.md"
CARD_SETTINGS = (
    "lora_r",
    "lora_alpha",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "batch_size",
    "max_length",
)
METHOD_TITLES = {"full": "A fully fine-tuned model"}
MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&^])")


def write_card(record: RunRecord, fingerprint: Json, stages: Sequence[str] = ()) -> None:
    """Whole or not at all. `stages`: their names, where the record is of several."""
    write_file(
        Path(record.adapter) / CARD_FILE,
        render_card(record, fingerprint, stages).encode(errors="backslashreplace"),
    )


def note_scale(folder: Path, scale: float, curve: Sequence[ScalePoint]) -> None:
    """Says in the card of an adapter, if it has one, that it is scaled; before its results, which
    are of scale 1."""
    file = folder / CARD_FILE
    if file.is_file():
        head, results, rest = file.read_text("utf-8", errors="replace").partition("\n## Results\n")
        note = f"\n## Scale\n\n{_describe_scale(scale, curve)}\n"
        file.write_text(f"{head}{note}{results}{rest}", encoding="utf-8")


def _describe_scale(scale: float, curve: Sequence[ScalePoint]) -> str:
    scale_text = f"The trained adapter times {scale:g}, by `lora_alpha`. All other numbers here are of the adapter as trained."
    measured_texts = [describe_tradeoff(curve, point) for point in curve if point.scale == scale]
    if not any(measured_texts):
        return f"{scale_text} At this scale nothing was measured in the run."
    return f"{scale_text} On rows by which a scale may be chosen, {scale:g} {measured_texts[0]}."


def render_card(record: RunRecord, fingerprint: Json, stages: Sequence[str] = ()) -> str:
    head = yaml.safe_dump(_build_front_matter(record.plan), sort_keys=False, allow_unicode=True)
    blocks = [
        _render_title(record),
        *_render_stages(stages),
        *_render_results(record),
        *_render_data(record.plan),
        *_render_training(record),
        *_render_limits(record),
    ]
    return (
        "\n\n".join(
            [
                f"---\n{head}---",
                *blocks,
                *_render_usage(record.plan),
                *_render_provenance(fingerprint),
            ]
        )
        + "\n"
    )


def escape_markdown(text: str) -> str:
    """Words of others on one line of Markdown: no mark-up, no control characters."""
    plain = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return MARKDOWN_SPECIAL.sub(r"\\\1", plain)


def _build_front_matter(plan: Plan) -> Json:
    is_adapter, base, license_id = (
        plan.config.method != "full",
        find_hub_name(plan.model),
        find_license(plan.model),
    )
    metadata: Json = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    if base:
        metadata |= {
            "base_model": base,
            "base_model_relation": "adapter" if is_adapter else "finetune",
        }
    if license_id:
        metadata["license"] = license_id
    return metadata | {
        "tags": ["tunesmith", *dict.fromkeys((str(plan.config.method), str(plan.config.stage)))]
    }


def find_hub_name(model: ModelSpec) -> str:
    """The base's name on the hub, if it was fetched from there."""
    return model.name if f"models--{model.name.replace('/', '--')}" in model.path.parts else ""


def find_license(model: ModelSpec) -> str:
    """As the base's own card or origin states it."""
    file = model.path / CARD_FILE
    if file.is_file() and (
        block := re.match(r"---\n(.*?)\n---", file.read_text("utf-8", errors="replace"), re.DOTALL)
    ):
        license_match = re.search(
            r"^license: *[\"']?([a-z0-9][a-z0-9.-]*)[\"']? *$", block[1], flags=re.MULTILINE
        )
        return license_match[1] if license_match else ""
    license_match = re.search(r"\((Apache-2\.0|MIT)\)", model.origin)
    return license_match[1].lower() if license_match else ""


# ---------------------------------------------------------------- blocks


def _render_title(record: RunRecord) -> str:
    plan = record.plan
    kind, name = (
        METHOD_TITLES.get(plan.config.method, f"An adapter ({plan.config.method})"),
        Path(plan.config.output_dir).name,
    )
    date_text = f" on {str(plan.config.now)[:10]}" if plan.config.now is not None else ""
    origin_text = f": {escape_markdown(plan.model.origin)}" if plan.model.origin else ""
    return (
        f"# {escape_markdown(name)}\n\n{kind} of {escape_markdown(plan.model.name)}{origin_text}, trained{date_text} with tunesmith "
        f"{record.version}. Every number here was measured in that run."
    )


def _render_stages(names: Sequence[str]) -> Iterator[str]:
    if names:
        stage_names = ", ".join(map(escape_markdown, names))
        yield f"It was trained in stages: {stage_names}. Results are of all of them, data and settings below of the last."


def _render_results(record: RunRecord) -> Iterator[str]:
    yield "## Results"
    if not record.comparisons:
        yield "Nothing was measured: the recipe named neither `test_data` nor `retention_data`."
        return
    rows = [
        (
            escape_markdown(f"{comparison.task}, {comparison.metric}")
            + ("" if comparison.higher_is_better else " (lower is better)"),
            str(comparison.after.n),
            f"{comparison.before.value:.3f}",
            f"{comparison.after.value:.3f}",
            f"{comparison.difference:+.3f} ({comparison.low:+.3f} to {comparison.high:+.3f})",
            verdict,
        )
        for comparison, verdict in zip(
            record.comparisons, judge_comparisons(record.comparisons), strict=True
        )
    ]
    yield _render_table(
        ("measure", "n", "before", "after", "change, 95% interval", "verdict"), rows
    )
    yield "Before and after are of the same items, and the change is paired by item."


def _render_data(plan: Plan) -> Iterator[str]:
    yield "## Data"
    rows = [
        (
            role,
            escape_markdown(Path(report.path).name),
            f"{report.rows:,}",
            f"{report.tokens:,}",
            f"`{report.fingerprint[:16]}`",
        )
        for role, report in plan.data.items()
    ]
    yield _render_table(("role", "file", "rows", "tokens", "sha256 begins with"), rows)


def _render_training(record: RunRecord) -> Iterator[str]:
    plan, machine = record.plan, record.plan.machine
    yield "## Training"
    rows = [
        (f"`{key}`", f"`{format_value(plan.values[key])}`")
        for key in (*CARD_SETTINGS, "seed")
        if key in plan.values
    ]
    rows.append(("steps", f"{record.steps:,} over {record.tokens:,} tokens"))
    rows.append(("time", format_duration(record.train_seconds)))
    rows.append(("memory", f"{format_bytes(record.peak_bytes)} at most"))
    rows.append(("machine", f"{escape_markdown(machine.device_name)}, {machine.cores} cores"))
    yield _render_table(("what", "value"), rows)


def _render_limits(record: RunRecord) -> Iterator[str]:
    """What was not shown, and what the run itself warned of."""
    lines = [
        f"- {escape_markdown(text)}" for text in (*record.plan.warnings, *record.input_changes)
    ]
    lines.append(
        "- Only what the table says was measured. Nothing is known of other tasks, of safety or of bias."
    )
    lines.append("- One training run: how much another seed would differ is not in the intervals.")
    yield "## Limits\n\n" + "\n".join(lines)


def _render_usage(plan: Plan) -> Iterator[str]:
    base = find_hub_name(plan.model) or "the folder of the base"
    yield "## Use"
    if plan.config.method == "full":
        lines = ['model = AutoModelForCausalLM.from_pretrained("this folder")']
    else:
        lines = [
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "this folder")',
        ]
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    imports = imports if plan.config.method == "full" else ["from peft import PeftModel", *imports]
    lines.append(
        'tokenizer = AutoTokenizer.from_pretrained("this folder")  # with the chat template it was trained with'
    )
    yield "```python\n" + "\n".join([*imports, *lines]) + "\n```"
    if plan.config.method != "full":
        yield "In tunesmith, `adapter_from: this folder` goes on training it; `tunesmith chat RUN` talks to its run."


def _render_provenance(fingerprint: Json) -> Iterator[str]:
    hashes: dict[str, Any] = {
        f"base {name}": value for name, value in fingerprint.get("base_sha256", {}).items()
    }
    hashes |= {name: fingerprint[name] for name in ("tokenizer",) if name in fingerprint}
    hashes |= {
        f"chat template {name}": value for name, value in fingerprint.get("templates", {}).items()
    }
    versions = [
        (escape_markdown(name), escape_markdown(str(value)))
        for name, value in fingerprint.get("versions", {}).items()
    ]
    if hashes or versions:
        yield "## Provenance"
        yield _render_table(
            ("what", "sha256 or version"),
            [
                *((escape_markdown(label), f"`{digest}`") for label, digest in hashes.items()),
                *versions,
            ],
        )


def _render_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
