"""The container image, built from the Dockerfile on a base made here, because no registry of images is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED_GIGABYTES = 40

FROM_THE_HOST = ("/etc/pip.conf", "/etc/ssl/certs")
"""How this machine reaches its package registry."""

Buildah = Callable[..., str]


def missing() -> str | None:
    """Why no image can be built here; None if one can."""
    absent = [program for program in ("buildah", "debootstrap") if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install buildah debootstrap"
    if os.geteuid() != 0:
        return "debootstrap needs root"
    free = shutil.disk_usage("/tmp").free / 1e9
    return None if free > NEEDED_GIGABYTES else f"{free:.0f} GB free, of {NEEDED_GIGABYTES} that copies of layers need"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]


@pytest.fixture
def buildah(tmp_path: Path) -> Iterator[Buildah]:
    """Calls it with a storage of the test's own, and returns what it printed."""
    storage = tmp_path / "storage"
    settings = {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}

    def call(*arguments: str) -> str:
        command = ["buildah", f"--root={storage}/root", f"--runroot={storage}/run", *arguments]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()

    yield call
    # Not left to pytest, which keeps the folders of three sessions.
    call("rm", "--all")
    shutil.rmtree(storage)


@pytest.fixture
def base(tmp_path: Path, buildah: Buildah) -> str:
    """Debian with its own Python and pip."""
    system = tmp_path / "system"
    packages = "--include=python3,python3-pip,ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", system], check=True, capture_output=True)
    container = buildah("from", "scratch")
    buildah("add", container, str(system), "/")
    # Which pip refuses to add to, unlike the Python of the image that the Dockerfile names.
    buildah("config", "--env=PIP_BREAK_SYSTEM_PACKAGES=1", container)
    buildah("commit", "--rm", container, "base")
    shutil.rmtree(system)
    return "localhost/base"


def test_the_image_can_do_what_it_is_for(buildah: Buildah, base: str) -> None:
    mounted = [f"--volume={path}:{path}:ro" for path in FROM_THE_HOST if Path(path).exists()]
    said = buildah("build", f"--build-arg=BASE={base}", *mounted, "--tag=distgan", ".")
    # By the Dockerfile itself.
    assert "ready to train" in said
    container = buildah("from", "distgan")
    assert "ready to train" in buildah("run", container, "distgan", "doctor")
    assert buildah("run", container, "id", "-u") == "1000"
    buildah("run", container, "distgan", "pack", "builtin:digits", "datasets/digits", "--resolution", "32")
    recipe = "/opt/distgan/configs/digits-dcgan.yaml"
    changes = ["training.steps=2", "evaluation.every=0"]
    buildah("run", container, "distgan", "train", recipe, *changes)
    assert buildah("run", container, "distgan", "status", recipe) == "finished 2"
