"""The device that the tests of this folder run on: one GPU, or the CPU as a rehearsal (DISTGAN_TEST_DEVICE=cpu)."""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = os.environ.get("DISTGAN_TEST_DEVICE") == "cpu"


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """Skip every test here without a GPU. Processes that tests start see one GPU, or none in a rehearsal."""
    if REHEARSAL:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU; DISTGAN_TEST_DEVICE=cpu rehearses these tests on the CPU")
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return torch.device("cuda")
