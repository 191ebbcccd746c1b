"""Errors of the Hub's client, with what they lack: which repository it was, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled


TransportError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of whichever client it has
AGAIN = "Nothing on this machine was changed by that"  # in every message, so that no error is explained twice


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
    except RuntimeError as error:  # which huggingface_hub wraps what happens to a large file in
        if not isinstance(error.__cause__, TransportError):
            raise
        raise ConnectionError(explanation(error, repo_id)) from error


def explanation(error: BaseException, repo_id: str) -> str:
    """What a failed push means, and what to do."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        cause = "HF_HUB_OFFLINE is set. Unset it"
    elif isinstance(error, FileNotFoundError) and error.filename:  # the client's own of that kind names no file
        cause = f"{error.filename} was removed while it was pushed (save_total_limit does that). Keep it longer"
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
