"""The repository on the hub that an adapter is uploaded to, checked before anything is loaded.

    check_target(repo) -> HubTarget

Repositories are private unless the user asks otherwise, and an existing public one is refused then.
In: a name. Out: what is there. Left out: the export and the upload (hub.py)."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tunesmith.core.errors import InputError
from tunesmith.core.hub_names import is_hub_id
from tunesmith.core.hub_repo import HubRef, hub_errors

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
        message = f"{repo!r:.80} is not a repository name" if repo else "the repository is missing"
        raise InputError(message, where=WHERE, fix=fix)
    if get_token() is None:
        fix = "set HF_TOKEN to a token with write access"
        raise InputError("there is no token for the hub", where=WHERE, fix=fix)
    with hub_errors(HubRef("model", repo, where=WHERE), is_upload=True):
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
