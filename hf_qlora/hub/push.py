"""`model.push_to_hub("me/adapter")`: one commit of what `save_pretrained` writes, and errors that say what to do.

transformers' own push would put its empty card over the adapter's, read the card of `main` when another branch is pushed
to, and stop at a folder in a folder. Here everything is prepared in a temporary folder, the repository's card extended,
and uploaded in one commit: the Hub has the old state or the new one. What is uploaded already is not sent again, so that
pushing again after an error is cheap, and after a commit whose answer was lost it is no commit at all.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants, errors, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import PeftModel

from hf_qlora.config import QLoRAConfig


logger = logging.getLogger(__name__)

TransportError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of whichever client it has
AGAIN = "Nothing on this machine was changed by that"  # in every message, so that no error is explained twice


def push_to_hub(
    original: Callable[..., Any],
    pushed: PeftModel | QLoRAConfig,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """`PushToHubMixin.push_to_hub`, for a model with an adapter of ours, or a config of ours.

    Args:
        kwargs: for stock adapters; `max_shard_size` means nothing for adapters.

    Raises:
        HfHubHTTPError: the Hub's answer, with the repository and the way out added to its message.
        ConnectionError: the Hub cannot be reached, or the connection broke.
    """
    options = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
    messages = {"commit_message": commit_message, "commit_description": commit_description}
    if not is_ours(pushed):
        return original(pushed, repo_id, **options, **messages, tags=tags, **kwargs)
    warn_of_local_bases(pushed)
    api, what = HfApi(library_name="hf_qlora"), "model" if isinstance(pushed, PeftModel) else "config"
    with explained(repo_id), tempfile.TemporaryDirectory() as folder:
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            _create_branch(api, repo_id, revision, token, create_pr)
        if what == "model":
            _fetch_card(repo_id, Path(folder), revision, token)
        pushed.save_pretrained(folder)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {what}",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def is_ours(pushed: Any) -> bool:
    """Whether it is a config of ours, or a model with an adapter that has one."""
    configs = pushed.peft_config.values() if isinstance(pushed, PeftModel) else [pushed]
    return any(isinstance(config, QLoRAConfig) for config in configs)


def warn_of_local_bases(pushed: Any) -> None:
    """Say so where an adapter names a base that only this machine has."""
    configs = pushed.peft_config if isinstance(pushed, PeftModel) else {"": pushed}
    for config in configs.values():
        base = config.base_model_name_or_path
        if base is None and isinstance(pushed, PeftModel):
            base = getattr(pushed.get_base_model(), "name_or_path", None)
        if base and Path(base).is_dir():
            logger.warning(
                "The adapter's base is the folder %s, which others do not have: they cannot load the adapter by its "
                "name alone. Set base_model_name_or_path in the adapter's config (model.peft_config[...]) to the id "
                "of the base on the Hub, and push again.",
                base,
            )


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Add to what the Hub's client raises which repository it was, why, and what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        if AGAIN not in str(error):
            error.append_to_message(f"\n{explanation(error, repo_id)}")
        raise
    except (TransportError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(explanation(error, repo_id)) from error


def explanation(error: BaseException, repo_id: str) -> str:
    """What a failed push means, and what to do."""
    if isinstance(error, OfflineModeIsEnabled):
        cause = "HF_HUB_OFFLINE is set. Unset it"
    elif isinstance(error, HfHubHTTPError):
        cause = _cause(error.response.status_code, repo_id)
    else:
        cause = (
            f"The Hub at {constants.ENDPOINT} cannot be reached or broke the connection ({error}). Look at the network"
        )
    return f"Pushing to {repo_id} failed. {cause}, and push again. {AGAIN}; what is uploaded is not sent twice."


def _cause(status: int, repo_id: str) -> str:
    if status == 401:
        return "There is no token, or it is not valid. Log in with `hf auth login`, or set HF_TOKEN or token="
    if status == 403:
        return f"This token may not write to {repo_id}. Use one with write access, or a repository of your own"
    if status == 404:
        return "There is no such repository or branch, or this token may not see it. Check name, revision and token"
    if status in (409, 412):
        return "Somebody else has changed it at the same time. Look at what they pushed"
    if status == 429:
        return "The Hub has had too many requests. Wait"
    if status >= 500:
        return f"The Hub failed (HTTP {status}), before or after it made the commit. Wait a little"
    return f"The Hub refused it (HTTP {status}) for the reason above. Mend that"


def _create_branch(api: HfApi, repo_id: str, revision: str, token: bool | str | None, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 403 or not create_pr:  # a pull request needs no right to make branches
            raise


def _fetch_card(repo_id: str, folder: Path, revision: str | None, token: bool | str | None) -> None:
    """Put the repository's card where `save_pretrained` extends it."""
    try:
        found = hf_hub_download(repo_id, constants.REPOCARD_NAME, revision=revision, token=token)
    except LocalEntryNotFoundError:  # not reached: a card that cannot be read must not be replaced
        raise
    except EntryNotFoundError:
        return
    shutil.copyfile(found, folder / constants.REPOCARD_NAME)
