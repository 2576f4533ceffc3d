"""Whether a hub will take artifacts, before any work: rights, names, what is there; a door of huggingface_hub.

Who may write is asked where the hub decides it: the first request of an upload, which changes nothing, is refused
without the right. For repos that are yet to be made there is only what the token says of itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from converter.errors import PublishError
from converter.hub import Remote, look, read_part
from converter.hub_calls import TIMEOUT, Patience, Tell, api, explained, patiently, session, together
from converter.provenance import FILE, LIMIT_BYTES, read_statement
from converter.publish import Destination, check_origin

CARD = "README.md"
CARD_BYTES = 64 << 10  # of a card in which hubmill's mark is looked for
MARK = b"quantized_by: hubmill"
SLUG = re.compile(r"[\w.-]+/[\w.-]+-[0-9a-f]{24}", re.ASCII)  # of a collection, beginning with its owner
PROBE = {"files": [{"path": CARD, "sample": "IyA=", "size": 2}]}  # what an upload of a card would ask first


def rights_problems(
    places: Sequence[Destination], endpoint: str | None, token: str | None, tell: Tell
) -> list[PublishError]:
    """Why publishing to these places could not succeed: what concerns the token first, then place by place."""
    client = api(endpoint, token)
    try:
        with explained("publish", "this account", endpoint, PublishError):
            account = Account(who=patiently(client.whoami, Patience(tell=tell)))
    except PublishError as error:
        return [error]
    if account.reads_only:
        return [PublishError("publish", "the token can only read", "Set HF_TOKEN to a token with write access")]
    rights = _Rights(account=account, endpoint=endpoint, token=token, patience=Patience(tell=tell))
    found = [error for errors in together(rights.problems, places, Event()) for error in errors]
    return list({str(error): error for error in found}.values())  # what lacks for an owner is told once


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a hub's whoami says of the token's owner."""

    who: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return str(self.who["name"])

    @property
    def _access(self) -> Mapping[str, Any]:
        return (self.who.get("auth") or {}).get("accessToken") or {}

    @property
    def reads_only(self) -> bool:
        return self._access.get("role") == "read"

    @property
    def writable(self) -> list[str]:
        """The owners under which the account may make repos, as far as their roles tell."""
        orgs = {org["name"]: org.get("roleInOrg") for org in self.who.get("orgs", ())}
        return sorted([self.name, *(name for name, role in orgs.items() if role not in (None, "read"))])

    def lacks(self, owner: str, repo: str, permission: str) -> bool:
        """Whether a fine-grained token was not given this permission, for the owner or for the repo."""
        if self._access.get("role") != "fineGrained":
            return False
        fine = self._access.get("fineGrained") or {}
        scopes = [scope for scope in fine.get("scoped", ()) if scope.get("entity", {}).get("name") in (owner, repo)]
        return permission not in [*fine.get("global", ()), *(one for s in scopes for one in s.get("permissions", ()))]


@dataclass(frozen=True, kw_only=True)
class _Rights:
    """Asks about one place after the other."""

    account: Account
    endpoint: str | None
    token: str | None = field(repr=False)
    patience: Patience

    def problems(self, place: Destination) -> list[PublishError]:
        """What stands against publishing to one place."""
        where = f"publish {place.repo}"
        try:
            with explained(where, place.repo, self.endpoint, PublishError):
                return list(self._problems(place, where))
        except PublishError as error:
            return [error]

    def _problems(self, place: Destination, where: str) -> Iterator[PublishError]:
        owner, _, name = place.repo.rpartition("/")
        owner = owner or self.account.name
        repo = f"{owner}/{name}"
        try:
            main = look(repo, place.kind, None, self.endpoint, self.token, self.patience)
        except RepositoryNotFoundError:
            main = None
        if main is None and (owner not in self.account.writable or self.account.lacks(owner, repo, "repo.write")):
            yield self._no_right(f"publish to {owner}", f"may not make repos for {owner}")
        elif main is not None and not self._may_write(main, place):
            yield self._no_right(where, f"may not write to {repo}")
        if place.collection:
            keeper = place.collection.partition("/")[0] if SLUG.fullmatch(place.collection) else owner
            if keeper not in self.account.writable or self.account.lacks(keeper, repo, "collection.write"):
                yield self._no_right(f"publish to {keeper}", f"may not change or make a collection of {keeper}")
        if main is None:
            return
        head = main
        if place.branch:
            try:
                head = look(repo, place.kind, place.branch, self.endpoint, self.token, self.patience)
            except RevisionNotFoundError:
                return
            if head.commit == main.commit:
                return
        try:
            check_owner(place, head, where)
        except PublishError as error:
            yield error

    def _no_right(self, where: str, what: str) -> PublishError:
        owners = ", ".join(self.account.writable)
        remedy = f"Ask for the right, set HF_TOKEN to a token that has it, or choose an owner among {owners}"
        return PublishError(where, f"{self.account.name}, by this token, {what}", remedy)

    def _may_write(self, main: Remote, place: Destination) -> bool:
        """Whether the hub would take an upload; anybody may open a pull request where they may read."""
        url = f"{main.endpoint}/api/{main.kind}s/{main.repo}/preupload/main"

        def ask() -> None:
            response = session().post(
                url,
                headers=dict(build_hf_headers(token=self.token)),
                json=PROBE,
                params={"create_pr": "1"} if place.pull_request else None,
                timeout=TIMEOUT,
            )
            hf_raise_for_status(response)

        try:
            patiently(ask, self.patience)
        except HfHubHTTPError as error:
            if error.response.status_code == 403:
                return False
            raise
        return True


def check_owner(place: Destination, head: Remote, where: str) -> None:
    """Raise PublishError when what is there was put there by somebody else, or is of another source.

    A publish leaves nothing but the artifact, so a wrong name would wipe a model out. A repo with a card alone, as
    people make it on the hub's pages, is as good as empty.
    """
    theirs = sorted(set(head.sizes) - {CARD})
    if place.replace or not theirs:
        return
    if FILE in head.sizes:
        statement = read_statement(read_part(head, FILE, 0, min(head.sizes[FILE], LIMIT_BYTES)))
        if statement is not None:
            check_origin(place, statement, where)
            return
    if CARD in head.sizes and MARK in read_part(head, CARD, 0, min(head.sizes[CARD], CARD_BYTES)):
        return  # made before there was provenance
    what = f"{head.repo} holds files that hubmill did not put there ({', '.join(theirs[:3])})"
    raise PublishError(where, what, "Choose another publish.repo, or write replace: true to replace them all")
