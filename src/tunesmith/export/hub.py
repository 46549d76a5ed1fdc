"""Export to the Hugging Face hub: the adapter and its card, in one commit, after the parity gate.

    export_to_hub(run, target)            -> ExportResult with an Upload

What is uploaded names no folder of this machine. After the commit the hub is asked what it holds,
and each file's hash is compared. Left out: where to (hub_target.py), asking the user
(cli/app.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi

from tunesmith.core.atomic import MANIFEST
from tunesmith.core.errors import MachineError
from tunesmith.core.hub_names import SHOWN_COMMIT_CHARS
from tunesmith.core.hub_repo import HubRef, hub_errors, request_files
from tunesmith.core.types import __version__
from tunesmith.export.export import ExportResult, Upload, export_run
from tunesmith.export.hub_target import WHERE, HubTarget


def export_to_hub(run: Path, target: HubTarget, *, scale: float = 1.0) -> ExportResult:
    """Export the adapter of a run to a temporary folder, verify it as any export, and upload it.

    Raises what `export_run` raises; InputError for a token without the right to write, MachineError
    for an upload that fails."""
    with TemporaryDirectory(prefix="tunesmith-hub-") as scratch:
        folder = Path(scratch) / "adapter"
        result = export_run(run, "hub", scale=scale, out=folder)
        upload = _upload_folder(folder, target)
    return dataclasses.replace(result, path="", upload=upload)


def _upload_folder(folder: Path, target: HubTarget) -> Upload:
    """Create the repository if it is new, and commit all files of a folder at once."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    api = HfApi()
    with hub_errors(HubRef("model", target.repo, where=WHERE), is_upload=True):
        if target.is_new:
            api.create_repo(target.repo, private=not target.is_public)
        commit = api.create_commit(
            target.repo,
            [CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message=f"Adapter trained and verified by tunesmith {__version__}",
        )
        uploaded = request_files(HubRef("model", target.repo, commit.oid, WHERE))
    uploaded_by_name = {file.name: file for file in uploaded}
    for name, path in files.items():
        if name in uploaded_by_name and uploaded_by_name[name].has_content_of(path):
            continue
        message = f"the hub does not hold {name} as it was uploaded"
        fix = f"check commit {commit.oid[:SHOWN_COMMIT_CHARS]} of {target.repo}, and export again"
        raise MachineError(message, where=WHERE, fix=fix)
    return Upload(str(commit.commit_url), commit.oid, target.is_public, len(files))
