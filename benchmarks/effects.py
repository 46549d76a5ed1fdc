"""Make the page of effects from a test report: `make effects`.

    python -m benchmarks.effects build/effects.xml docs/results/effects.md

In: JUnit XML whose test cases carry the measured changes as properties. Out: one table row per test
and seed, with the date, the processor and the command.
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

Does each strategy do what it promises? Real SmolLM2-135M-Instruct, short runs, three seeds each:
the change between before and after on held-out items with its 95% CI, paired by item.

{date}, {device} ({cores} cores). `make effects`

| test | seed | measured | change [95% CI] | result |
|---|---|---|---|---|
"""


def main() -> None:
    report, page = Path(sys.argv[1]), Path(sys.argv[2])
    machine = measure_machine()
    header = HEADER.format(date=date.today(), device=machine.device_name, cores=machine.cores)
    page.write_text(header + "\n".join(sorted(iter_rows(report))) + "\n")


def iter_rows(report: Path) -> Iterator[str]:
    for case in ElementTree.parse(report).iter("testcase"):
        has_failed = case.find("failure") is not None or case.find("error") is not None
        name, _, parameters = case.attrib["name"].partition("[")
        seed = re.findall(r"\d+", parameters)[-1:]
        method = re.sub(r"-?\d+\]$", "", parameters)
        title = name.removeprefix("test_").replace("_", " ") + (f" ({method})" if method else "")
        for item in case.iter("property"):
            outcome = "failed" if has_failed else "holds"
            cells = [title, *seed, item.attrib["name"], item.attrib["value"], outcome]
            yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
