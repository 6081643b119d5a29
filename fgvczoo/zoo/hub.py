"""Weights on the Hub: fetched into the client's own cache and checked there, and pushed.

`HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` and the client's other settings are honoured.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fgvczoo import __version__
from fgvczoo.errors import FgvczooError
from fgvczoo.zoo.card import model_card
from fgvczoo.zoo.config import CONFIG, PICTURES, README, TENSORS, DamagedWeights, read_config
from fgvczoo.zoo.weights import check_file, check_folder, weights_folder

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?")


def _client() -> HfApi:
    return HfApi(library_name="fgvczoo", library_version=__version__)


class Repo(NamedTuple):
    """A repository of the Hub: "owner/name", and a branch, tag or commit; None: its main branch."""

    id: str
    revision: str | None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def parse_repo(text: str) -> Repo | None:
    """ "owner/name" or "owner/name@revision" as a repository; None for what is none, and for a path.

    A name whose first part is a folder here, or "runs", is a path, though there may be nothing at its end.
    """
    match = _NAME.fullmatch(text)
    if match is None or Path(text).exists() or Path(text).parts[0] in (".", "..", "runs") or Path(text).parent.is_dir():
        return None
    return Repo(match[1], match[2])


def fetch(repo: Repo, *, sha256: str | None = None) -> Path:
    """The folder of a repository's weights in the client's cache, downloaded where it is not there, of one commit.

    Every file is checked against config.json, and config.json against `sha256` where one is given. A file that is cut
    or altered leaves the cache at once and is fetched once more.

    Raises `FgvczooError` for a repository, revision or file that does not exist or may not be read, for a Hub that
    cannot be reached while the cache has not all files, and for files that are still damaged.
    """
    try:
        return _fetch(repo, sha256)
    except DamagedWeights as damage:
        if constants.HF_HUB_OFFLINE:
            raise
        try:
            return _fetch(repo, sha256)
        except DamagedWeights:
            raise DamagedWeights(f"{repo} on the Hub: {damage}") from None


def _fetch(repo: Repo, sha256: str | None) -> Path:
    with _hub_errors(repo):
        config = Path(_client().hf_hub_download(repo.id, CONFIG, revision=repo.revision))
    folder = config.parent  # .../snapshots/COMMIT
    try:
        if sha256 is not None:
            check_file(config, sha256)
        for name in _files(repo, config):
            with _hub_errors(repo):
                _client().hf_hub_download(repo.id, name, revision=folder.name)
        check_folder(folder)
    except DamagedWeights:
        for name in (CONFIG, TENSORS, PICTURES):
            (folder / name).resolve().unlink(missing_ok=True)  # what the link in the cache leads to
            (folder / name).unlink(missing_ok=True)
        raise
    return folder


def _files(repo: Repo, config: Path) -> list[str]:
    """What there is to fetch beside config.json."""
    try:
        return [name for name in read_config(config)["files"] if name in (TENSORS, PICTURES)]
    except DamagedWeights:
        raise
    except FgvczooError as error:
        raise FgvczooError(f"{repo} on the Hub: {error}") from None


def is_cached(repo: Repo) -> bool:
    """Whether the weights of a repository load without the Hub."""
    try:
        _client().hf_hub_download(repo.id, TENSORS, revision=repo.revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    return True


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    licence: str | None = None,
    message: str | None = None,
) -> Repo:
    """Uploads a weights folder as one commit; the repository is made where it does not exist.

    folder: of a run, or as `save_weights` wrote it. repo: "owner/name". private: of a repository that is made.
    revision: a branch, made where it does not exist; None: main. licence: the Hub's name of a licence ("cc-by-nc-4.0"),
    needed where the weights do not say what they are under. message: of the commit.

    Returns the repository with the commit. Raises `FgvczooError` for weights that may not be passed on, a damaged
    folder, a repository that holds something else than weights of fgvczoo, and what the Hub refuses.
    """
    match = _NAME.fullmatch(repo)
    if match is None or match[2] is not None:
        raise FgvczooError(f"push: {repo!r} is not the name of a repository; expected owner/name, and a branch apart")
    goal = Repo(repo, None)
    folder = weights_folder(Path(folder))
    config = check_folder(folder)
    _check_terms(config, folder, licence)
    card = model_card(config, goal.id, licence).encode()
    # One commit, by hand: the client's `upload_folder` may make several, and a reader could meet half of them.
    changes: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationAdd(README, card)]
    changes += [CommitOperationAdd(name, folder / name) for name in (CONFIG, *config["files"])]
    client = _client()
    with _hub_errors(goal):
        client.create_repo(goal.id, private=private, exist_ok=True)
        if revision is not None:
            client.create_branch(goal.id, branch=revision, exist_ok=True)
        _check_is_ours(Repo(goal.id, revision))
        if PICTURES not in config["files"] and client.file_exists(goal.id, PICTURES, revision=revision):
            changes.append(CommitOperationDelete(PICTURES))  # of weights that were there before
        title = message or f"Weights of {(config['provenance'] or {}).get('recipe') or config['paper']}"
        commit = client.create_commit(goal.id, changes, commit_message=title, revision=revision)
    return Repo(goal.id, str(commit.oid))


def _check_terms(config: dict[str, Any], folder: Path, licence: str | None) -> None:
    redistributable, terms = config["licence"].get("redistributable"), config["licence"].get("weights") or "not stated"
    if redistributable is False:
        raise FgvczooError(f"push: {folder} may not be passed on (weights: {terms})")
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,40}", licence):
        raise FgvczooError(f"push: licence {licence!r}; expected a name as the Hub has them, such as cc-by-nc-4.0")
    if redistributable is None and licence is None:
        raise FgvczooError(
            f"push: {folder} does not say under what terms it may be passed on (weights: {terms}; data: "
            f"{config['licence'].get('data') or 'not stated'}); if it may, state them, as in --licence cc-by-nc-4.0"
        )


def _check_is_ours(repo: Repo) -> None:
    """Nothing of somebody else's is overwritten."""
    try:
        present = _client().hf_hub_download(repo.id, CONFIG, revision=repo.revision)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise
        return
    try:
        read_config(Path(present))
    except FgvczooError:
        raise FgvczooError(f"push: {repo} holds other files than weights of fgvczoo; give another name") from None


@contextmanager
def _hub_errors(repo: Repo) -> Iterator[None]:
    """Errors of the client and of its transport as one line each, in place of its own reports of every try."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except GatedRepoError:
        raise FgvczooError(
            f"{repo}: access is gated; accept its terms on its page on the Hub, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise FgvczooError(
            f"{repo}: no such repository on the Hub, or it is private; check the name, or log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise FgvczooError(f"{repo.id}: no revision {repo.revision!r}; give a branch, tag or commit of it") from None
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise FgvczooError(
                f"{repo}: not in the cache, and HF_HUB_OFFLINE is set; unset it, or fetch it once while online"
            ) from None
        reason = _reason(error)
        raise FgvczooError(f"{repo}: the Hub cannot be reached ({reason}), and the cache has not all of it") from None
    except EntryNotFoundError as error:
        raise FgvczooError(f"{repo}: holds no weights of fgvczoo ({_reason(error)})") from None
    except HFValidationError:
        raise FgvczooError(f"{repo}: not the name of a repository; expected owner/name") from None
    except LocalTokenNotFoundError:
        raise FgvczooError(f"{repo}: not logged in; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise FgvczooError(
                f"{repo}: the Hub refuses access ({status}); log in with `hf auth login`, or set HF_TOKEN to a token "
                "that may do this"
            ) from None
        raise FgvczooError(f"{repo}: the Hub answers {status}; try again later") from None
    except OSError as error:  # a full disk, a size that is not the announced one
        raise FgvczooError(f"{repo}: {_reason(error)}; try again") from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise FgvczooError(f"{repo}: the connection broke off ({_reason(error)}); try again") from None
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the error at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
