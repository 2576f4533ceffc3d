"""Artifacts to a Hugging Face hub: each in one commit, upon the head that was looked at; a door of huggingface_hub.

Weights are uploaded first, which no reader sees, then one commit makes all files appear together. The hub is asked what
it holds before and after, and only that counts: so a publish that was cut goes on, an answer that was lost is no loss,
and what is there already is not sent again. `upload_folder`, the obvious call, makes several commits with xet.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars

from converter.errors import PublishError
from converter.folder import matches
from converter.hub import Remote, look
from converter.hub_calls import (
    FAULTS,
    LONGEST_COMMIT_WAIT,
    PASSING,
    Patience,
    Tell,
    api,
    explained,
    hush,
    overheard,
    patiently,
    wait_after,
    without_credentials,
)
from converter.hub_rights import SLUG, check_owner, rights_problems
from converter.publish import Destination, Published, changed_since

TRIES = 4  # times that somebody else may commit in between


@dataclass(frozen=True, kw_only=True)
class HuggingFaceHub:
    """A hub that speaks Hugging Face's protocol; `endpoint` and `token` default to the environment's.

    tell: hears of waits that the hub asks for.
    """

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    tell: Tell = field(default=hush, repr=False, compare=False)

    def problems(self, places: Sequence[Destination]) -> list[PublishError]:
        return rights_problems(places, self.endpoint, self.token, self.tell)

    def publish(self, place: Destination, folder: Path, files: Mapping[str, str], message: str) -> Published:
        where = f"publish {place.repo}"
        patience = Patience(
            longest_seconds=LONGEST_COMMIT_WAIT, passing=PASSING | {412}, tell=self.tell
        )  # 412: a head of long ago
        disable_progress_bars()  # only progress.py writes to the terminal
        with overheard(self.tell), explained(where, place.repo, self.endpoint, PublishError):
            client = api(self.endpoint, self.token)
            made = patiently(
                lambda: client.create_repo(place.repo, repo_type=place.kind, private=place.private, exist_ok=True),
                patience,
            )
            commits = _Commits(
                client=client,
                hub=self,
                place=replace(place, repo=made.repo_id),  # with its owner, where the manifest left it out
                folder=folder,
                files=files,
                message=message,
                patience=patience,
            )
            published = commits.request() if place.pull_request else commits.settle(*commits.branch())
            commits.collect()
        return published

    def look(self, place: Destination, revision: str | None, patience: Patience) -> Remote:
        return look(place.repo, place.kind, revision, self.endpoint, self.token, patience)


@dataclass(frozen=True, kw_only=True)
class _Commits:
    """One artifact on its way to one repo; everything raises what the client raises, or PublishError."""

    client: HfApi
    hub: HuggingFaceHub
    place: Destination
    folder: Path
    files: Mapping[str, str]  # path in the folder -> sha256 (hex)
    message: str
    patience: Patience
    additions: dict[str, CommitOperationAdd] = field(default_factory=dict)  # those that were needed so far

    @property
    def where(self) -> str:
        return f"publish {self.place.repo}"

    @property
    def url(self) -> str:
        endpoint = without_credentials(self.client.endpoint)
        return f"{endpoint}/{'' if self.place.kind == 'model' else 'datasets/'}{self.place.repo}"

    def look(self, revision: str | None) -> Remote:
        return self.hub.look(self.place, revision, self.patience)

    def difference(self, remote: Remote) -> tuple[list[str], list[str]]:
        """The files that a repo lacks or holds otherwise, and those it holds too many; hidden files are its own."""
        changed = [name for name in sorted(self.files) if not self._same(remote, name)]
        return changed, sorted(set(remote.sizes) - set(self.files))

    def _same(self, remote: Remote, name: str) -> bool:
        """By the sha256 that was measured where the hub has one, so that what is there already is not read here."""
        checksum = remote.checksums.get(name, "")
        path = self.folder / name
        if checksum.startswith("git:") and path.is_file() and path.stat().st_size == remote.sizes[name]:
            return matches(path, checksum)
        return checksum == f"sha256:{self.files[name]}"

    def _overwritten(self, before: Remote, after: Remote) -> list[str]:
        """What somebody else put there meanwhile and a commit of ours would take away again."""
        touched = [name for name in after.sizes if before.checksums.get(name) != after.checksums.get(name)]
        return [name for name in touched if name not in self.files or not self._same(after, name)]

    def _addition(self, name: str) -> CommitOperationAdd:
        """What to add for a file, its bytes found to be those that were measured; kept, so that it is read once."""
        if name not in self.additions:
            path = self.folder / name
            if not path.is_file():
                raise changed_since(self.place.repo, path)
            addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            if addition.upload_info.sha256.hex() != self.files[name]:
                raise changed_since(self.place.repo, path)
            self.additions[name] = addition
        return self.additions[name]

    def branch(self) -> tuple[str | None, Remote]:
        """The branch to commit to, made when it is not there, and what it holds."""
        name = self.place.branch or None
        try:
            head = self.look(name)
        except RevisionNotFoundError:
            patiently(
                lambda: self.client.create_branch(
                    self.place.repo, branch=self.place.branch, repo_type=self.place.kind, exist_ok=True
                ),
                self.patience,
            )
            head = self.look(name)
        # A branch that was just made holds what main does; to take that for somebody's would refuse every new branch.
        if name is None or head.commit != self.look(None).commit:
            check_owner(self.place, head, self.where)
        return name, head

    def settle(self, revision: str | None, before: Remote) -> Published:
        """Make a branch hold the files, whatever befalls the commit on its way."""
        number = 0
        for _ in range(TRIES):
            changed, gone = self.difference(before)
            if not changed and not gone:
                return self._published(before, changed=False)
            outcome = self._commit(before, revision, changed, gone)
            # A commit whose answer was lost may be there, and one that succeeded may lack what .gitignore names.
            after = self.look(revision)
            changed, gone = self.difference(after)
            if not changed and not gone:
                return self._published(after, changed=True)
            if isinstance(outcome, CommitInfo):
                what = f"the hub took the commit without {', '.join((changed + gone)[:3])}"
                raise PublishError(self.where, what, "Remove the repo's .gitignore, then run it again")
            if theirs := self._overwritten(before, after):
                what = f"somebody else committed {', '.join(theirs[:3])} at the same time"
                raise PublishError(self.where, what, "Look at the repo's history, then run it again")
            if after.commit == before.commit and not wait_after(outcome, number, self.patience):
                raise self._told(outcome)
            number += after.commit == before.commit
            before = after
        raise PublishError(self.where, "others commit all the time", "Run it again when the repo is quiet")

    def request(self) -> Published:
        """A pull request that holds the files, opened unless it is there; none when the main branch holds them."""
        main = self.look(None)
        check_owner(self.place, main, self.where)
        changed, gone = self.difference(main)
        if not changed and not gone:
            return self._published(main, changed=False)
        author = patiently(self.client.whoami, self.patience)["name"]
        for number in range(TRIES):
            found = self._find_request(author)
            if found is not None and found[1]:
                return self._requested(found[0], changed=number > 0)
            if found is not None and self.difference(closed := self.look(found[0])) == ([], []):
                note = "the pull request with exactly this was closed, so it is not opened again"
                return replace(self._published(closed, changed=False), url=self._page(found[0]), note=note)
            outcome = self._commit(main, None, changed, gone, create_pr=True)
            if isinstance(outcome, CommitInfo):
                return self._requested(str(outcome.pr_revision), changed=True)
            if self._find_request(author) == found:  # otherwise it was opened, and only the answer was lost
                if not wait_after(outcome, number, self.patience):
                    raise self._told(outcome)
                main = self.look(None)
                changed, gone = self.difference(main)
        raise PublishError(self.where, "no pull request could be opened", "Look at those that are open, and run again")

    def _requested(self, revision: str, *, changed: bool) -> Published:
        published = self.settle(revision, self.look(revision))
        return replace(published, changed=changed or published.changed, url=self._page(revision))

    def _page(self, revision: str) -> str:
        """The address of the pull request refs/pr/N."""
        return f"{self.url}/discussions/{revision.rpartition('/')[2]}"

    def _find_request(self, author: str) -> tuple[str, bool] | None:
        """The reference of the newest pull request with our title that is not merged, and whether it is open."""
        found = patiently(
            lambda: [
                one
                for one in self.client.get_repo_discussions(
                    self.place.repo, repo_type=self.place.kind, author=author, discussion_type="pull_request"
                )
                if one.title == self.message and one.status != "merged"
            ],
            self.patience,
        )
        newest = max(found, key=lambda one: (one.status != "closed", one.num), default=None)
        return None if newest is None else (f"refs/pr/{newest.num}", newest.status != "closed")

    def collect(self) -> None:
        """Put the repo into the collection, which is made when it is not there."""
        wanted, repo = self.place.collection, self.place.repo
        if not wanted:
            return
        if SLUG.fullmatch(wanted):
            collection = patiently(lambda: self.client.get_collection(wanted), self.patience)
        else:
            make = partial(
                self.client.create_collection,
                wanted,
                namespace=repo.partition("/")[0],
                private=self.place.private,
                exists_ok=True,
            )
            collection = patiently(make, self.patience)
        if not any(item.item_id == repo and item.item_type == self.place.kind for item in collection.items):
            patiently(
                lambda: self.client.add_collection_item(
                    collection.slug, item_id=repo, item_type=self.place.kind, exists_ok=True
                ),
                self.patience,
            )

    def _published(self, head: Remote, *, changed: bool) -> Published:
        return Published(repo=self.place.repo, commit=head.commit, changed=changed, url=self.url)

    def _told(self, failure: Exception) -> Exception:
        """The failure, when it is one that `explained` knows; the client's other errors have no words worth showing."""
        if isinstance(failure, FAULTS):
            return failure
        if isinstance(failure, (ConnectionError, TimeoutError)):  # of hf_xet, which has tried for minutes by then
            what = f"the connection to the hub's store failed or was cut ({type(failure).__name__})"
            return PublishError(self.where, what, "Check the network and run it again; what is uploaded stays")
        what = f"the hub's answer was not understood ({type(failure).__name__})"
        remedy = "Check that it is a Hugging Face hub, with HF_HUB_DISABLE_XET=1 if it has no xet"
        return PublishError(self.where, what, remedy)

    def _commit(
        self, before: Remote, revision: str | None, changed: Sequence[str], gone: Sequence[str], create_pr: bool = False
    ) -> CommitInfo | Exception:
        """Try one commit upon the head that was looked at. Uploads that are there, also of an earlier try, are kept."""
        added = [self._addition(name) for name in changed]
        deleted = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in gone]
        try:
            with warnings.catch_warnings():
                # Parquet in a model repo is meant: it is a model's weights.
                warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
                self.client.preupload_lfs_files(
                    self.place.repo,
                    added,
                    repo_type=self.place.kind,
                    revision=revision,
                    create_pr=create_pr,
                    free_memory=False,
                )
                return self.client.create_commit(
                    self.place.repo,
                    [*added, *deleted],
                    commit_message=self.message,
                    repo_type=self.place.kind,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=before.commit,
                )
        except Exception as failure:  # whatever it is: what the hub holds decides, and the text may hold a signed URL
            return failure
