"""`model.push_to_hub("me/adapter")`: one commit of what `save_pretrained` writes, and errors that say what to do.

transformers' own push would put its empty card over the adapter's, read the card of `main` when another branch is
pushed to, and stop at a folder in a folder. Here everything is prepared in a temporary folder, the repository's card
extended, and uploaded in one commit: the Hub has the old state or the new one. The commit is refused where somebody
has changed the repository since its card was fetched, so that nobody's words in it are lost. What is uploaded already
is not sent again, so that pushing again after an error is cheap, and after a commit whose answer was lost it is no
commit at all.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel

from hf_qlora.config import QLoRAConfig
from hf_qlora.hub import facts
from hf_qlora.hub.errors import explained


logger = logging.getLogger(__name__)


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
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """`PushToHubMixin.push_to_hub`, for a model with an adapter of ours, or a config of ours.

    Args:
        max_shard_size: without effect on an adapter, which is one file.

    Raises:
        HfHubHTTPError: the Hub's answer, with the repository and the way out added to its message.
        ConnectionError: the Hub cannot be reached, or the connection broke.
    """
    options = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
    messages = {"commit_message": commit_message, "commit_description": commit_description}
    if not facts.is_ours(pushed):
        commit: CommitInfo = original(pushed, repo_id, **options, **messages, max_shard_size=max_shard_size, tags=tags)
        return commit
    warn_of_local_bases(pushed)
    api, what = HfApi(library_name="hf_qlora"), "model" if isinstance(pushed, PeftModel) else "config"
    with explained(repo_id), tempfile.TemporaryDirectory() as folder:
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            _create_branch(api, repo_id, revision, token, create_pr)
        parent = None
        if what == "model":
            parent = api.model_info(repo_id, revision=revision, token=token).sha
            _fetch_card(repo_id, Path(folder), parent, token)
        pushed.save_pretrained(folder)
        if what == "model":
            _complete_card(pushed, repo_id, Path(folder), token, tags)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {what}",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )


def warn_of_local_bases(pushed: Any) -> None:
    """Say so where an adapter names a base that only this machine has.

    Args:
        pushed: a config, or a model that PEFT or transformers has put adapters on.
    """
    configs = getattr(pushed, "peft_config", {"": pushed})
    for config in configs.values():
        base = config.base_model_name_or_path or getattr(pushed, "name_or_path", None)
        if base and Path(base).is_dir():
            logger.warning(
                "The adapter's base is the folder %s, which others do not have: they cannot load the adapter by its "
                "name alone. Set base_model_name_or_path in the adapter's config (model.peft_config[...]) to the id "
                "of the base on the Hub, and push again.",
                base,
            )


def _create_branch(api: HfApi, repo_id: str, revision: str, token: bool | str | None, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 403 or not create_pr:  # a pull request needs no right to make branches
            raise


def _complete_card(
    model: PeftModel, repo_id: str, folder: Path, token: bool | str | None, tags: list[str] | None
) -> None:
    facts.ask_for_license(model, token)
    facts.write_card(model, folder, repo_id, picture=True, tags=tags)


def _fetch_card(repo_id: str, folder: Path, revision: str | None, token: bool | str | None) -> None:
    """Put the repository's card where `save_pretrained` extends it."""
    try:
        found = hf_hub_download(repo_id, constants.REPOCARD_NAME, revision=revision, token=token)
    except LocalEntryNotFoundError:  # not reached: a card that cannot be read must not be replaced
        raise
    except EntryNotFoundError:
        return
    shutil.copyfile(found, folder / constants.REPOCARD_NAME)
