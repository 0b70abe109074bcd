"""Errors of the client of the Hugging Face Hub, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from distgan.errors import UserError, printable
from distgan.files import is_disk_error, reason


@contextmanager
def hub_errors(what: str, instead: str = "") -> Iterator[None]:
    """Context manager that turns what huggingface_hub raises into the UserError `WHAT: cause; fix`.

    Args:
        instead: another fix, as an imperative.
    """
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's own errors, those of its HTTP library, and OSErrors
        wraps = type(error) is RuntimeError or isinstance(error, errors.LocalEntryNotFoundError)
        root = error.__cause__ if wraps and error.__cause__ is not None else error
        status = getattr(getattr(root, "response", None), "status_code", None)
        if isinstance(root, errors.RevisionNotFoundError):
            said, fix = "there is no such revision", "check what follows the @"
        elif status == 401 or isinstance(root, errors.RepositoryNotFoundError):
            said = "there is no such repository, or your token does not reach it"
            fix = "check the name, and run `hf auth login` or set HF_TOKEN"
        elif status == 403:
            said, fix = "your token may not do this", "use a token with write access to this user's repositories"
        elif isinstance(root, errors.HFValidationError):
            said, fix = _said(root), "check the name"
        elif is_disk_error(root):
            said, fix = reason(root), "free space there, or set HF_HOME to a folder on another disk"
        else:
            said, fix = _said(root), "check the network and HF_ENDPOINT, and try again"
        raise UserError(f"{what}: {said}; {fix}{instead and ', or '}{instead}") from None


def _said(error: BaseException) -> str:
    """Return the message on one line, without the queries of URLs, which may hold credentials."""
    text = re.sub(r"\?\S+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {printable(text)[:300]}"
