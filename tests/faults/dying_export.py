"""A process whose children die, or find the disk full, at calls that change a file while they
export a finished run.

    LD_PRELOAD=faultyfiles.so python dying_export.py FOLDER MODE EVERY TARGET...   ->   one JSON
    object on stdout

Every EVERYth call that differs in this mode is tried, and the one after the last, where the export
succeeds. `watch`: one export goes through, and what stands there is looked at before each call and
with half of each write done: a process that is killed leaves just that. TARGET is gguf-f16 and the
like. What a death leaves must be nothing under the final name, or all of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from dying import MODES, WATCH, child, die_at, watch_calls

from tiny_export import save_model, save_run
from tunesmith.core.atomic import verify_dir
from tunesmith.export.export import export_run


def rest(place: Path) -> str:
    """What stands under the final name, and whether anything is left beside it."""
    what = (
        ("whole" if not verify_dir(place) else f"damaged: {verify_dir(place)}")
        if place.exists()
        else "nothing"
    )
    beside = sorted(
        path.name.partition("-made")[0] for path in place.parent.iterdir() if path != place
    )
    return " ".join([what, *beside])


def try_all(finished: Path, name: str, folder: Path, mode: int, every: int) -> dict[str, object]:
    target, _, kind = name.partition("-")
    place = folder / name / "made"

    def export() -> str:
        return export_run(finished, target, kind=kind or None, out=place).path

    seen = folder / f"seen-{name}"  # which is not below the folder that is watched

    def look(_number: int, _is_torn: bool) -> None:
        with seen.open("a") as file:
            file.write(f"9 {rest(place)}\n")

    place.parent.mkdir(parents=True)
    calls = watch_calls(place.parent, export, look)
    if mode == WATCH:
        endings = Counter([*seen.read_text().splitlines(), f"0 {rest(place)}"])
        num_torn = sum(call.can_tear for call in calls)
        return {"calls": len(calls), "torn": num_torn, "endings": endings}
    shutil.rmtree(place.parent)
    endings = Counter[str]()
    tried = [call.number for call in calls if call.fails_in(mode)][::every]
    for number in (*tried, len(calls) + 1):
        place.parent.mkdir(parents=True)
        status, messages = die_at(place.parent, number, mode, lambda _: export())
        reason = next(
            (words for words in ("no space left on the disk",) if words in messages),
            "" if status in (0, 9) else messages,
        )
        endings[" ".join(part for part in (str(status), rest(place), reason) if part)] += 1
        shutil.rmtree(place.parent)
    return {"calls": len(calls), "endings": endings}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, mode, every, *names = (
        Path(sys.argv[1]),
        MODES.index(sys.argv[2]),
        int(sys.argv[3]),
        *sys.argv[4:],
    )
    code, messages = child(lambda: str(save_run(folder / "work", save_model(folder / "model"))))
    assert code == 0, messages
    print(json.dumps({name: try_all(Path(messages), name, folder, mode, every) for name in names}))  # noqa: T201
