"""View of `export`: the files, and their parity with the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from tunesmith.cli.views import make_table
from tunesmith.core.formatting import format_bytes

if TYPE_CHECKING:
    from tunesmith.export.export import ExportResult

MAX_ROUNDING_SHARE = 0.1  # of the KL that training caused
ROUNDING_WARNING = (
    "[yellow]warning[/] this format's rounding loses much of what training changed; "
    "use --to peft, or --to gguf --type f32"
)


def render_export(export: ExportResult) -> RenderableType:
    """Show the files and the parity checks of an export."""
    parity = export.parity
    title = f"{export.target} {export.type}".strip()
    table = make_table(title, "file", "size", "sha256", numbers=("size",))
    for file in export.files:
        table.add_row(escape(file.name), format_bytes(file.bytes), Text(file.sha256[:12], "dim"))
    parts: list[RenderableType] = [table]
    if export.scale != 1:
        parts.append(f"adapter scale {export.scale:g}")
    if export.base.mean_kl:
        candidates = ", ".join(f"{base} {kl:.1e}" for base, kl in export.base.mean_kl.items())
        parts.append(
            f"merged into the {export.base.base} weights; mean KL to the run, by base: {candidates}"
        )
    parts.append(
        f"{parity.same_prompts} of {parity.rendered_prompts} prompts render to the same tokens, "
        f"{parity.same_answers} of {parity.prompts} greedy answers are identical"
    )
    kl_text = f"KL to the run: mean {parity.mean_kl:.1e}, max {parity.max_kl:.1e} nats/token"
    if parity.trained_kl is not None:
        kl_text += f" (training caused {parity.trained_kl:.1e})"
    parts.append(kl_text)
    if parity.trained_kl and parity.mean_kl > MAX_ROUNDING_SHARE * parity.trained_kl:
        parts.append(ROUNDING_WARNING)
    parts.append(
        f"top-1 agreement {parity.top1_agreement:.1%} over {parity.positions} tokens, "
        f"largest logit difference {parity.max_logit_difference:.2g}"
    )
    return Group(*parts, escape(export.path))
