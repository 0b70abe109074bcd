"""Two sets of images against each other: the formats of a set, what is compared, and one line for each mistake."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distgan.cli.parser import parse
from distgan.data.packing.pack import pack
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.comparison.compare import compare_images
from distgan.evaluation.comparison.image_sets import open_images
from tests.commands import mistake, output
from tests.labelled_shards import pictures
from tests.ranks import RankPool
from tests.sources import one_line

REALS, FAKES = pictures(60), 255 - pictures(50)
DETECTOR = "evaluation.detector=tests.unit.test_image_sets:Corner"


class Corner(nn.Module):
    """Features (n, 4): the pixels of a corner."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 4:6, 4:6].flatten(1).float()


def write_folder(folder: Path, images: Tensor) -> Path:
    """PNGs of gray images (n, 1, H, W) at several levels of folders."""
    for number, image in enumerate(images):
        place = folder / ("" if number % 3 else "train/deep")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{number:03d}.png")
    return folder


def write_zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder))
    return path


def write_npz(path: Path, images: Tensor) -> Path:
    np.savez(path, arr_0=images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy(), arr_1=np.arange(3))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_folder(folder / "fakes", FAKES)
    write_folder(folder / "reals", REALS)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "cache"))


def compare(fakes: Path, reals: Path | None, *overrides: str, **named: Any) -> dict[str, float]:
    return compare_images(fakes, reals, [DETECTOR, *overrides], Runtime(), **named)


def refused(fakes: Path, reals: Path | None, *overrides: str, **named: Any) -> str:
    with pytest.raises(UserError) as error:
        compare(fakes, reals, *overrides, **named)
    return one_line(error)


def distance() -> float:
    """The Fréchet distance of the corners, with a matrix root by numpy's eigenvalues."""
    a, b = (Corner()(images).double().numpy() for images in (REALS, FAKES))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * root)


def test_every_format_holds_the_same_images(sets: Path, tmp_path: Path) -> None:
    fakes, reals = sets / "fakes", sets / "reals"
    (tmp_path / "flat").mkdir()
    for number, image in enumerate(REALS):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"flat/{number:03d}.png")
    pack(tmp_path / "flat", tmp_path / "shards", shard_size=25, workers=1)
    expected = {"generated": 50, "real": 60, "fid[Corner]": pytest.approx(distance(), rel=1e-6)}
    for other in (
        reals, write_zip(tmp_path / "r.zip", reals), write_npz(tmp_path / "r.npz", REALS), tmp_path / "shards",
    ):  # fmt: skip
        assert compare(fakes, other) == expected, other
    assert compare(write_npz(tmp_path / "f.npz", FAKES), reals) == expected


def test_the_command_prints_the_values(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--images", str(sets / "fakes"), str(sets / "reals"), "evaluation.metrics=[fid,precision_recall]"]
    found = json.loads(output(capsys, "evaluate", DETECTOR, *words))
    assert list(found) == [
        "generated", "real", "fid[Corner]", "precision_recall_precision[Corner]", "precision_recall_recall[Corner]",
    ]  # fmt: skip
    assert found["fid[Corner]"] == pytest.approx(distance(), rel=1e-6)
    assert "leave out RUN_OR_CHECKPOINT" in mistake(capsys, "evaluate", "runs/x", *words)
    assert parse(["evaluate", "--images", "a", "evaluation.metrics=[fid]"]).images == ("a", None)
    with pytest.raises(SystemExit):
        parse(["evaluate", "--images", "a", "b", "c"])


def on_a_rank(fakes: Path, reals: Path, cache: str, overrides: list[str]) -> dict[str, float]:
    return compare(fakes, reals, f"evaluation.cache_dir={cache}", "evaluation.batch_size=8", *overrides)


def test_values_do_not_depend_on_the_ranks(sets: Path, tmp_path: Path, ranks: RankPool) -> None:
    metrics = ["evaluation.metrics=[fid,kid,{metric: precision_recall, samples: 20}]"]
    given = sets / "fakes", sets / "reals"
    [expected] = ranks.run(1, on_a_rank, *given, str(tmp_path / "1"), metrics)
    for found in ranks.run(2, on_a_rank, *given, str(tmp_path / "2"), metrics):
        assert found == pytest.approx(expected, rel=1e-9)
    broken = write_folder(tmp_path / "broken", FAKES)
    (broken / "001.png").write_bytes(b"broken")
    (broken / "002.png").write_bytes((broken / "004.png").read_bytes()[:-30])
    for said in ranks.run(2, refused_on_a_rank, broken, sets / "reals", str(tmp_path / "2")):
        assert f"{broken}: 2 of 50 images cannot be read" in said


def refused_on_a_rank(fakes: Path, reals: Path, cache: str) -> str:
    return refused(fakes, reals, f"evaluation.cache_dir={cache}", "evaluation.batch_size=8")


def test_fewer_images_are_a_random_choice_of_the_set(sets: Path, tmp_path: Path) -> None:
    """The first 10 in order of name would all be black; an addressed choice of 10 of 100 has about 5."""
    images = torch.zeros(100, 1, 8, 8, dtype=torch.uint8)
    images[50:] = 200
    fakes = write_npz(tmp_path / "f.npz", images)
    reals = write_npz(tmp_path / "r.npz", torch.randint(0, 2, (100, 1, 8, 8), dtype=torch.uint8))
    found = compare(fakes, reals, "evaluation.num_samples=10")
    # Levels of mean 100 and deviation about 100 in each of four equal features: the squared mean alone is 40,000.
    # Black images alone have a distance of about 1.
    assert found["fid[Corner]"] > 10_000
    assert found["generated"] == 10
    assert "fid[Corner] measures 101 generated images, found 100" in refused(fakes, reals, "evaluation.num_samples=101")


def test_sizes_must_agree_or_be_set(sets: Path, tmp_path: Path) -> None:
    large = write_folder(tmp_path / "large", FAKES.repeat_interleave(2, 2).repeat_interleave(2, 3))
    said = refused(large, sets / "reals")
    assert f"32 x 32 pixels in {large} and 16 x 16 pixels in {sets / 'reals'}" in said
    assert "data.resolution=16" in said
    assert compare(large, sets / "reals", "data.resolution=16")["fid[Corner]"] == pytest.approx(distance(), rel=0.2)
    mixed = write_folder(tmp_path / "mixed", FAKES)
    Image.new("L", (16, 20)).save(mixed / "031.png")
    assert f"{mixed}/031.png: found 16 x 20 pixels, expected 16 x 16" in refused(mixed, sets / "reals")
    assert "found 16 x 20 pixels" in refused(sets / "fakes", mixed)
    for _ in range(2):  # and statistics of the resized images in the cache are not taken for others
        compare(sets / "fakes", mixed, "data.resolution=16")
        assert "found 16 x 20 pixels" in refused(sets / "fakes", mixed)
    compare(mixed, sets / "reals", "data.resolution=16")
    wide = write_folder(tmp_path / "wide", FAKES[:, :, :8])
    assert "16 x 8 pixels" in refused(wide, wide)


def test_real_images_that_cannot_be_read_are_counted(sets: Path, tmp_path: Path) -> None:
    reals = write_folder(tmp_path / "reals", REALS)
    (reals / "001.png").write_bytes(b"broken")
    for _ in range(2):  # the second time from the cache, if the first had left anything there
        assert "1 of 60 samples cannot be read" in refused(sets / "fakes", reals)
    found = compare(sets / "fakes", reals, "data.max_failure_rate=0.05")
    assert found["fid[Corner]"] == pytest.approx(distance(), rel=0.2)
    Image.fromarray(REALS[1, 0].numpy()).save(reals / "001.png")
    assert compare(sets / "fakes", reals)["fid[Corner]"] == pytest.approx(distance(), rel=1e-6)


def test_published_statistics_in_place_of_real_images(sets: Path, tmp_path: Path) -> None:
    features = Corner()(REALS).double().numpy()
    np.savez(tmp_path / "known.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    found = compare(sets / "fakes", None, real_statistics=tmp_path / "known.npz")
    assert found == {"generated": 50, "fid[Corner,real=known]": pytest.approx(distance(), rel=1e-6)}
    assert "found one set, but fid[Corner] compares with real images" in refused(sets / "fakes", None)
    said = refused(sets / "fakes", sets / "reals", real_statistics=tmp_path / "known.npz")
    assert "takes the place of the real images" in said
    assert "kid compares with the samples" in refused(
        sets / "fakes", None, "evaluation.metrics=[kid]", real_statistics=tmp_path / "known.npz"
    )


class Sorter(nn.Module):
    """One feature, and certain logits of two classes: whether the upper left corner is bright."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        bright = images[:, :1, 0, 0].float() / 255
        return torch.cat([bright, bright], 1), 1000 * torch.cat([bright - 0.5, 0.5 - bright], 1)


def test_a_score_of_one_set(tmp_path: Path) -> None:
    """Two equally frequent classes that are told apart for sure have an inception score of 2 (Salimans et al. 2016).

    It is computed in ten splits, and would be 1 in order of name. Files are links to elsewhere, as a choice from a
    larger folder is.
    """
    images = torch.zeros(100, 1, 8, 8, dtype=torch.uint8)
    images[50:] = 255
    whole = write_folder(tmp_path / "whole", images)
    (tmp_path / "links").mkdir()
    for file in whole.rglob("*.png"):
        (tmp_path / "links" / file.name).symlink_to(file)
    score = "evaluation.metrics=[inception_score]"
    found = compare(tmp_path / "links", None, score, DETECTOR.replace("Corner", "Sorter"))
    assert 1.8 < found["inception_score[Sorter]"] <= 2


def test_one_image_has_no_covariance(sets: Path, tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", FAKES[:1])
    assert "found 1 samples of one side, expected at least 2" in refused(one, sets / "reals")
    assert "found 1 samples of one side, expected at least 2" in refused(sets / "fakes", one)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=3", "not a key of this comparison; expected evaluation"),
        ("data.path=x", "not a key of this comparison"),
        ("evaluation.metrics=[ppl]", "ppl needs a generator, found images"),
        ("evaluation.metrics=[modes]", "modes needs points, found images"),
        ("evaluation.metrics=[nothing]", "'nothing' is not known"),
        ("data.resolution=big", "data.resolution"),
    ],
)
def test_keys_that_a_comparison_does_not_have(sets: Path, override: str, message: str) -> None:
    assert message in refused(sets / "fakes", sets / "reals", override)


def test_what_is_no_set_of_images(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("-")
    whole = write_zip(tmp_path / "whole.zip", sets / "fakes").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "one.npy").write_bytes(buffer.getvalue())
    np.savez(tmp_path / "none.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([object()]))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    content = write_npz(tmp_path / "cut.npz", FAKES).read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:-1000])
    for name, message in (
        ("empty", "found no images"), ("notes", "found no images, .*ignored 1 file"), ("absent", "no such path"),
        ("cut.zip", "not a readable zip"), ("one.npy", "not a set of images"),
        ("none.npz", "no array arr_0, but images"),
        ("floats.npz", r"arr_0 of float64 and shape \(2, 4, 4, 3\), expected uint8"), ("objects.npz", "Python objects"),
        ("packed.npz", "is compressed; write the file again with numpy.savez"), ("cut.npz", "not a readable .npz"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{name}: .*{message}") as error:
            open_images(tmp_path / name)
        one_line(error)
    with pytest.raises(UserError, match="found a URL"):
        open_images("s3://bucket/images")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/1.png").write_bytes(b"-")
    assert "none of the 1 images can be read; the first: " in refused(tmp_path / "bad", sets / "reals")
