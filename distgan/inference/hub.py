"""Hugging Face Hub: download an export from there, or push one. The client is huggingface_hub (extra `hub`).

It honors HF_ENDPOINT, HF_TOKEN, HF_HOME and its other variables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from distgan.autoencoders.exporting import DECODER_FILE
from distgan.errors import UserError, printable
from distgan.hub_errors import hub_errors
from distgan.packages import is_installed

SCHEME = "hf://"
EXPORT_FILES = ("config.json", "model.safetensors")
CARD_FILES = ("README.md", "samples.png")
_LIMITS = {"config.json": 16 << 20, "model.safetensors": 16 << 30, DECODER_FILE: 16 << 30}
"""Largest sizes that are downloaded, in bytes."""
_ADDRESS = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Address(NamedTuple):
    """A repository of the Hub."""

    repository: str
    """`USER/NAME`."""
    revision: str | None
    """Branch, tag or commit; None is the newest of the main branch."""

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_address(path: str) -> bool:
    """Return True for `hf://...`."""
    return path.startswith(SCHEME)


def parse_address(text: str) -> Address:
    """Read `hf://USER/NAME` or `hf://USER/NAME@REVISION`.

    Raises:
        UserError: it has another form, or the package huggingface_hub is not installed.
    """
    match = _ADDRESS.fullmatch(text.removeprefix(SCHEME))
    if match is None or ".." in text or "--" in match[1] or len(text) > 200:
        raise UserError(f"{printable(text)[:200]}: expected hf://USER/NAME or hf://USER/NAME@REVISION")
    if not is_installed("huggingface_hub"):
        raise UserError(f"{text}: the package huggingface_hub is not installed; pip install 'distgan[hub]'")
    return Address(match[1], match[2])


def download(text: str) -> Path:
    """Download the export of an address to the cache of huggingface_hub; return its folder.

    Only `config.json` and `model.safetensors` are downloaded, of one commit, if their sizes are within the limits.

    Raises:
        UserError: there is no such export, a file is too large, or the Hub cannot be reached.
    """
    address = parse_address(text)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        with hub_errors(f"{address}: is not in the cache, and HF_HUB_OFFLINE is set"):
            return Path(snapshot_download(address.repository, revision=address.revision, local_files_only=True))
    with hub_errors(f"{address}: cannot be downloaded"):
        info = HfApi().model_info(address.repository, revision=address.revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    files = [*EXPORT_FILES, *(name for name in sizes if name == DECODER_FILE)]
    for name in files:
        size = sizes.get(name)
        if size is None:
            raise UserError(f"{address}: has no {name}, so it is not an export of distgan; name another repository")
        if size > _LIMITS[name]:
            raise UserError(
                f"{address}: {name} has {size:,} bytes, more than the limit of {_LIMITS[name]:,}; if you trust it, "
                "download it yourself and pass its folder"
            )
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):  # becomes the name of a folder
        raise UserError(f"{address}: cannot be downloaded: the server named no commit; check HF_ENDPOINT")
    with hub_errors(f"{address}: cannot be downloaded"):
        # By commit, so that these are the files whose sizes were checked.
        folder = snapshot_download(address.repository, revision=commit, allow_patterns=files)
    return Path(folder)


def push(folder: Path, address: Address, *, private: bool = False) -> str:
    """Upload an export with its model card in one commit; return the URL of the repository, which is created if needed.

    Args:
        private: create the repository as private; refuse one that is public.

    Raises:
        UserError: there is no token, no network or no permission.
    """
    from huggingface_hub import HfApi, get_token

    api = HfApi()
    with hub_errors(f"{address}: cannot be pushed"):
        if get_token() is None:
            raise UserError(f"{address}: cannot be pushed: no token; run `hf auth login`, or set HF_TOKEN")
        url = api.create_repo(address.repository, private=private or None, exist_ok=True)
        if private and not api.model_info(address.repository).private:
            raise UserError(f"{address}: exists and is public; make it private on the Hub, or remove --private")
        api.upload_folder(
            repo_id=address.repository, folder_path=folder, allow_patterns=[*EXPORT_FILES, DECODER_FILE, *CARD_FILES],
            commit_message="Export of distgan",
        )  # fmt: skip
    return str(url)
