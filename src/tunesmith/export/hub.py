"""Export to the Hugging Face hub: the adapter and its card, in one commit, after the parity gate.

    check_target(repo)                    -> HubTarget, before anything is loaded
    export_to_hub(run, target)            -> ExportResult with an Upload

Repositories are private unless the user asks otherwise, and an existing public one is refused then.
What is uploaded names no folder of this machine. After the commit the hub is asked what it holds,
and each file's hash is compared. Left out: asking the user (cli/app.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tunesmith.core.atomic import MANIFEST
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.hub_names import SHOWN_COMMIT_CHARS, is_hub_id
from tunesmith.core.hub_repo import HubRef, hub_errors, request_files
from tunesmith.core.types import __version__
from tunesmith.export.export import ExportResult, Upload, export_run

WHERE = "--repo"


@dataclass(frozen=True)
class HubTarget:
    """A repository to upload to, and how many files it holds already."""

    repo: str
    is_public: bool
    is_new: bool
    num_files: int = 0

    @property
    def description(self) -> str:
        """The target in words, as a question to the user names it."""
        visibility = "public" if self.is_public else "private"
        if self.is_new:
            return f"{self.repo}, a new {visibility} repository"
        files = "1 file" if self.num_files == 1 else f"{self.num_files} files"
        return (
            f"{self.repo}, a {visibility} repository with {files}; those named alike are replaced"
        )


def check_target(repo: str | None, *, is_public: bool = False) -> HubTarget:
    """Ask the hub about a repository to upload to.

    Raises InputError without a token, for a name that is none, and for an existing repository that
    is public unless that was asked for; MachineError if the hub cannot be reached."""
    if repo is None or not is_hub_id(repo) or "@" in repo:
        fix = "name the repository: --repo OWNER/NAME"
        message = f"{repo!r:.80} is no repository" if repo else "the repository is missing"
        raise InputError(message, where=WHERE, fix=fix)
    if get_token() is None:
        fix = "set HF_TOKEN to a token with write access"
        raise InputError("there is no token for the hub", where=WHERE, fix=fix)
    with hub_errors(HubRef("model", repo, where=WHERE)):
        try:
            info = HfApi().model_info(repo)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return HubTarget(repo, is_public, is_new=True)
    if info.private is False and not is_public:
        fix = "add --public to publish the adapter there, or name another repository"
        raise InputError(f"{repo} exists and is public", where=WHERE, fix=fix)
    if info.private is not False and is_public:
        fix = "leave --public out, or make it public on the hub"
        raise InputError(f"{repo} exists and is private", where=WHERE, fix=fix)
    return HubTarget(repo, is_public, is_new=False, num_files=len(info.siblings or ()))


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
