from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.ranks import RankPool

# Examples are slow when the machine is busy, which says nothing about the code.
hypothesis.settings.register_profile("distgan", deadline=None)
hypothesis.settings.load_profile("distgan")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits at 16x16 with labels, in ragged shards."""
    from distgan.data.packing.pack import pack

    folder = tmp_path_factory.mktemp("digits") / "shards"
    pack("builtin:digits", folder, resolution=16, shard_size=500, workers=1)
    return folder
