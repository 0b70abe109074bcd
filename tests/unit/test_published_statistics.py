"""Mean and covariance of real features from an .npz file: the same FID as of the images, and one line per mistake."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distgan.config import Config
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.comparison.published_statistics import read_statistics, with_real_statistics
from distgan.evaluation.detectors.loading import load_detector
from distgan.evaluation.metrics.frechet import Reference, frechet_distance
from distgan.evaluation.moments import Gaussian
from distgan.evaluation.suite import Evaluator
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.shards import build_index
from tests.sources import one_line

REALS, FAKES = pictures(60), 255 - pictures(50)


class Corner(nn.Module):
    """Features (n, 4): the pixels of a corner."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 4:6, 4:6].flatten(1).float()


def generate(numbers: Tensor) -> Tensor:
    return FAKES[numbers % len(FAKES)]


def evaluate(config: Config) -> dict[str, float]:
    return Evaluator(config, build_index(config.data.path), Runtime())(generate)


def write_npz(path: Path, **changed: Any) -> Path:
    features = Corner()(REALS).double().numpy()
    arrays = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False), **changed}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_fid_is_that_of_the_images(tmp_path: Path, compressed: bool) -> None:
    """With float32 numbers and other arrays in the file too, as in ADM's; no real image is read."""
    shards = write_shards(tmp_path / "shards", REALS)
    both = {"metric": "fid_infinity", "samples": 50}
    config = evaluation_config(
        shards, tmp_path / "cache", num_samples=50, detector=Corner, metrics=["fid", both, "precision_recall"]
    )
    index = build_index(shards)
    expected = Evaluator(config, index, Runtime())(generate)
    file = write_npz(tmp_path / "my reals.npz", arr_0=REALS.numpy(), mu_s=np.zeros(3))
    if compressed:
        arrays = dict(np.load(file))
        np.savez_compressed(file, **arrays)
    with pytest.raises(UserError, match=r"--real-statistics .*precision_recall compares with the samples .*\[fid\]"):
        with_real_statistics(config, str(file))
    metrics = [section for section in config.metrics if section.metric != "precision_recall"]
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"metrics": metrics})})
    for tar in Path(shards).glob("*.tar"):
        tar.write_bytes(b"")
    again = Evaluator(with_real_statistics(config, str(file)), index, Runtime())(generate)
    assert again == {
        "fid[Corner,real=my_reals]": pytest.approx(expected["fid[Corner]"], rel=1e-9),
        "fid_infinity[Corner,real=my_reals]": pytest.approx(expected["fid_infinity[Corner]"], rel=1e-9),
    }


def test_another_file_of_one_name_is_not_taken_for_the_first(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", REALS)
    config = evaluation_config(shards, tmp_path / "cache", num_samples=50, detector=Corner, metrics=["fid"])
    file = write_npz(tmp_path / "r.npz")
    [first] = evaluate(with_real_statistics(config, str(file))).values()
    mean = np.load(file)["mu"] + [3, 0, 0, 0]
    write_npz(file, mu=mean)
    [second] = evaluate(with_real_statistics(config, str(file))).values()
    shift = (mean - Corner()(FAKES).double().numpy().mean(0))[0]
    assert second - first == pytest.approx(shift**2 - (shift - 3) ** 2, rel=1e-6)


def test_statistics_of_an_unknown_number_of_images() -> None:
    """Only the known number of generated samples bounds the rank: two of them here, so that one root counts.

    Samples (1, 0) and (-1, 0) have covariance diag(2, 0). Its distance to N(0, diag(2, 3)) is tr 3 by hand.
    """
    reference = Reference(
        None, torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([2.0, 3.0]).double().sqrt())
    )
    few = Gaussian(2, torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([2.0, 0.0]).double()))
    many = Gaussian(1000, torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([2.0, 3.0]).double()))
    assert float(frechet_distance(reference, few)) == pytest.approx(3)
    assert float(frechet_distance(reference, many)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigma": None}, "found the arrays mu, but no sigma"),
        ({"mu": None, "sigma": None, "arr_0": np.zeros(3)}, "no mu and sigma; .*evaluate --images"),
        ({"mu": np.array([object()] * 4)}, "mu holds Python objects"),
        ({"mu": np.zeros(3)}, r"mu float64 \(3,\) and sigma float64 \(4, 4\); expected"),
        ({"mu": np.zeros(4, int)}, r"mu int64 \(4,\)"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "statistics of 5 features, but the detector Corner has 4"),
        ({"sigma": np.full((4, 4), np.nan)}, "not finite"),
        ({"mu": np.full(4, np.inf)}, "not finite"),
        ({"sigma": np.triu(np.ones((4, 4)))}, "not symmetric"),
    ],
)
def test_files_with_other_arrays(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    file = write_npz(tmp_path / "wrong.npz", **changed)
    with pytest.raises(UserError, match=f"wrong.npz: .*{message}") as error:
        read_statistics(file, load_detector(Corner()))
    one_line(error)


def test_damaged_files(tmp_path: Path) -> None:
    """Truncated anywhere, not a zip, or a header that claims terabytes; the reading ends with one line each."""
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w") as archive:
        for name, shape in (("mu", "(4,)"), ("sigma", "(1000000, 1000000)")):
            header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
            archive.writestr(
                f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(32)
            )
    detector = load_detector(Corner())
    with pytest.raises(UserError, match="sigma is too large") as error:
        read_statistics(bomb, detector)
    one_line(error)
    for number, content in enumerate([b"", b"PK", whole[:100], whole[:-10], whole[:300] + b"xxxx" + whole[304:]]):
        file = tmp_path / f"{number}.npz"
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{number}.npz: not a readable .npz") as error:
            read_statistics(file, detector)
        one_line(error)
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(UserError, match=r"not a readable \.npz|not a statistics file"):
            read_statistics(path, detector)


def test_a_matrix_that_is_no_covariance(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "r.npz", sigma=np.diag([1.0, 1, 1, -0.1]))
    with pytest.raises(UserError, match=r"eigenvalues are -0.1 to 1, expected none below 0"):
        read_statistics(file, load_detector(Corner())).check_covariance()
    rounded = write_npz(tmp_path / "s.npz", sigma=np.diag([1.0, 1, 1, -1e-8]).astype(np.float32))
    read_statistics(rounded, load_detector(Corner())).check_covariance()
