"""Format the results of the benchmark as a markdown table."""

from __future__ import annotations

from statistics import mean

from tunesmith.core.types import Json

LAST_STEPS = 5  # whose mean loss is compared
HEAD = ("", "tunesmith", "TRL {trl} + PEFT {peft}", "ratio", "goal")


def table(results: Json) -> str:
    """Return the table, with rows for each part that ran."""
    versions = results["versions"]
    head = [cell.format(trl=versions["trl"], peft=versions["peft"]) for cell in HEAD]
    lines = [
        line
        for part, lines_of in FORMATTERS.items()
        if part in results
        for line in lines_of(results)
    ]
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def compute_final_loss(losses: list[float]) -> float:
    return mean(losses[-LAST_STEPS:])


def format_speed(results: Json) -> list[list[str]]:
    ours, theirs = results["speed"]["tunesmith"], results["speed"]["trl"]
    best = theirs["best"]
    tokens = [f"{side['tokens_per_second']:.0f}" for side in (ours, best)]
    ratio = ours["tokens_per_second"] / best["tokens_per_second"]
    lines = [
        [
            "useful tokens/s",
            tokens[0],
            f"{tokens[1]} ({best['name']})",
            f"{ratio:.2f}x",
            "at least 3.0x",
        ]
    ]
    padded = theirs["padded"]
    peaks = [f"{side['peak_bytes'] / 1e9:.2f} GB" for side in (ours, padded)]
    ratio = ours["peak_bytes"] / padded["peak_bytes"]
    lines.append(
        [
            "peak memory",
            peaks[0],
            f"{peaks[1]} ({padded['name']})",
            f"{ratio:.2f}x",
            "at most 0.55x",
        ]
    )
    if "gemm" in results:
        rate = results["gemm"]["median"]
        shares = [f"{side['work_per_second'] / rate:.2f}" for side in (ours, best)]
        lines.append(
            [f"share of the GEMM rate, {rate / 1e9:.0f} GFLOP/s", *shares, "", "at least 0.60"]
        )
    return lines


def format_loss(results: Json) -> list[list[str]]:
    losses = [results["loss"][side] for side in ("tunesmith", "trl")]
    ours, theirs = (compute_final_loss(side) for side in losses)
    what = f"loss after {len(losses[0])} equal steps (mean of the last {LAST_STEPS})"
    return [[what, f"{ours:.4f}", f"{theirs:.4f}", f"{ours / theirs - 1:+.2%}", "within 1%"]]


def format_startup(results: Json) -> list[list[str]]:
    start = results["start"]
    taken = f"{start['begun']:.1f} s ({start['done']:.1f} s until it is done)"
    return [[f"start to first step, {start['rows']:,} rows", taken, "", "", "under 15 s"]]


def format_rendering(results: Json) -> list[list[str]]:
    rows_a_minute = 60 * results["render"]["rows_per_second"]
    return [
        [
            "rendering and tokenizing, rows per minute",
            f"{rows_a_minute:,.0f}",
            "",
            "",
            "at least 150,000",
        ]
    ]


def format_prefixes(results: Json) -> list[list[str]]:
    chat, pairs = results["prefix"]["chat"], results["prefix"]["pairs"]
    rows, best = (
        f"rows under one system prompt, {chat['saved']:.0%} of their tokens shared",
        chat["trl"],
    )
    shared = chat["shared"]["tokens_per_second"]
    times = f"{shared / best['tokens_per_second']:.2f}x"
    theirs = f"{best['tokens_per_second']:.0f} ({best['name']})"
    lines = [[f"{rows}: useful tokens/s", f"{shared:.0f}", theirs, times, "at least 4.2x"]]
    for what, job, goal in (
        ("the same", chat, "at least 0.90 of it"),
        ("pairs with long prompts", pairs, "at least 1.6x"),
    ):
        speeds = [job[name]["tokens_per_second"] for name in ("shared", "alone")]
        ideal = 1 / (1 - job["saved"])
        speedup = speeds[0] / speeds[1]
        ratio = f"{speedup:.2f}x of {ideal:.2f}x, {speedup / ideal:.2f} of it"
        lines.append(
            [f"{what}, shared and not", f"{speeds[0]:.0f} and {speeds[1]:.0f}", "", ratio, goal]
        )
    return lines


FORMATTERS = {
    "speed": format_speed,
    "loss": format_loss,
    "start": format_startup,
    "render": format_rendering,
    "prefix": format_prefixes,
}
