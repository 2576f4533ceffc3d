"""Artifacts to a Hugging Face hub; with hub.py the door of huggingface_hub.

`publish` makes one commit on the head that was looked at. `upload_folder`, the obvious call, makes several with xet.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import disable_progress_bars

from converter.errors import PublishError
from converter.folder import matches
from converter.hub import FAULTS, Remote, explained, look, patiently
from converter.publish import Kind, Published, changed_since


@dataclass(frozen=True, kw_only=True)
class HuggingFaceHub:
    """A hub that speaks Hugging Face's protocol; `endpoint` and `token` default to the environment's."""

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    private: bool | None = None  # of repos that are made; None leaves it to the hub

    def check(self, repo: str, kind: Kind) -> None:
        where = f"publish {repo}"
        with explained(where, repo, self.endpoint, PublishError):
            me = patiently(lambda: HfApi(endpoint=self.endpoint, token=self.token).whoami())
        owner = repo.split("/")[0] if "/" in repo else me["name"]
        roles = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])} | {me["name"]: "admin"}
        if roles.get(owner, "read") == "read":
            what = f"{me['name']} may not write to {owner}"
            raise PublishError(where, what, f"Choose an owner among {', '.join(sorted(roles))}, or ask for a role")
        access = (me.get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise PublishError(where, "the token can only read", "Set HF_TOKEN to a token with write access")

    def publish(self, repo: str, folder: Path, files: Mapping[str, str], message: str, kind: Kind) -> Published:
        where = f"publish {repo}"
        api = HfApi(endpoint=self.endpoint, token=self.token)
        for name, sha256 in files.items():
            if not (folder / name).is_file() or not matches(folder / name, f"sha256:{sha256}"):
                raise changed_since(repo, folder / name)
        with explained(where, repo, self.endpoint, PublishError):
            patiently(lambda: api.create_repo(repo, repo_type=kind, private=self.private, exist_ok=True))
            before = look(repo, kind, None, self.endpoint, self.token)
        url = f"{before.endpoint}/{'' if kind == 'model' else 'datasets/'}{repo}"
        changed, gone = difference(before, folder, files)
        if not changed and not gone:
            return Published(repo=repo, commit=before.commit, changed=False, url=url)
        failure: Exception | None = None
        try:
            self._commit(api, before, folder, changed, gone, message)
        except (*FAULTS, ValueError) as error:  # ValueError: the client's own, for an answer it does not understand
            failure = error
        # A commit whose answer was lost may be there, and one that succeeded may have left out what .gitignore names.
        with explained(where, repo, self.endpoint, PublishError):
            after = look(repo, kind, None, self.endpoint, self.token)
            changed, gone = difference(after, folder, files)
            if not changed and not gone:
                return Published(repo=repo, commit=after.commit, changed=True, url=url)
            if failure is None:
                what = f"the hub took the commit without {', '.join((changed + gone)[:3])}"
                raise PublishError(where, what, "Remove the repo's .gitignore, then run it again")
            if after.commit != before.commit:
                what = f"somebody else committed to {repo} at the same time"
                raise PublishError(where, what, "Look at its history, then run it again")
            if isinstance(failure, FAULTS):
                raise failure
        what = f"the hub's answer was not understood ({type(failure).__name__})"
        raise PublishError(
            where, what, "Check that it is a Hugging Face hub, with HF_HUB_DISABLE_XET=1 if it has no xet"
        )

    def _commit(
        self, api: HfApi, before: Remote, folder: Path, changed: list[str], gone: list[str], message: str
    ) -> None:
        """One commit upon the head that was looked at; weights are uploaded first, which no reader sees."""
        disable_progress_bars()  # only progress.py writes to the terminal
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in changed]
        with warnings.catch_warnings():
            # Parquet in a model repo is meant: it is a model's weights.
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            api.preupload_lfs_files(before.repo, added, repo_type=before.kind)
            api.create_commit(
                before.repo,
                [*added, *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in gone)],
                commit_message=message,
                repo_type=before.kind,
                parent_commit=before.commit,
            )


def difference(remote: Remote, folder: Path, files: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The files that a repo lacks or holds otherwise, and those it holds too many; hidden files are the repo's own."""
    changed = []
    for name, sha256 in sorted(files.items()):
        checksum = remote.checksums.get(name, "")
        if checksum != f"sha256:{sha256}" and not (checksum.startswith("git:") and matches(folder / name, checksum)):
            changed.append(name)
    return changed, sorted(set(remote.sizes) - set(files))
