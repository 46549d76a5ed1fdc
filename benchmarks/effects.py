"""Write docs/results/effects.md from the test report of the effect tests: `make effects`.

    python -m benchmarks.effects build/effects.xml docs/results/effects.md

In: JUnit XML whose test cases carry the measured changes as properties. Out: one table row per test
and seed, with date, processor and command.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from tunesmith.core.hardware import measure_machine

HEADER = """# Effects, measured

Does each strategy have the effect it promises? SmolLM2-135M-Instruct, short runs, three seeds each:
the change on held-out items with its 95% CI, paired by item.

{date}, {device} ({cores} cores). `make effects`

| test | seed | measured | change [95% CI] | result |
|---|---|---|---|---|
"""


def main() -> None:
    report = Path(sys.argv[1])
    page = Path(sys.argv[2])
    machine = measure_machine(Path())
    header = HEADER.format(date=date.today(), device=machine.device_name, cores=machine.cores)
    rows = sorted(iter_rows(report))
    if not rows:
        sys.exit(f"{report}: no test recorded an effect")
    page.write_text(header + "\n".join(rows) + "\n")


def iter_rows(report: Path) -> Iterator[str]:
    """Yield a table row for each measured change in the report."""
    for case in ElementTree.parse(report).iter("testcase"):
        has_failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if has_failed else "passed"
        name, _, parameters = case.attrib["name"].partition("[")
        seed = re.findall(r"\d+", parameters)[-1:]
        method = re.sub(r"-?\d+\]$", "", parameters)
        title = name.removeprefix("test_").replace("_", " ") + (f" ({method})" if method else "")
        for item in case.iter("property"):
            cells = [title, *seed, item.attrib["name"], item.attrib["value"], outcome]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
