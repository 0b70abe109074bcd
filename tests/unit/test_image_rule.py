"""One rule of how images become pixels, through every way in, against Pillow and NumPy."""

from __future__ import annotations

import io
import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from distgan.config import DataConfig
from distgan.data.index.loading import load_index
from distgan.data.kinds.images import has_metadata
from distgan.data.packing.conversion import is_lossless_webp
from distgan.data.packing.pack import pack
from distgan.data.reader import read_samples
from tests.shards import build_index, refusal, write_tar

SIDE = 8
MODES = {
    "JPEG": ["L", "RGB", "CMYK"],
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "WEBP": ["RGB", "RGBA"],
}
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
COLORS = {"white": (255, 255, 255), "black": (0, 0, 0), "#ff00ff": (255, 0, 255)}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF>'
    "</x:xmpmeta>"
)


def encode(picture: Image.Image, kind: str, turn: int, by: str, **options: Any) -> bytes:
    """A file that says in EXIF or XMP data how it lies."""
    buffer = io.BytesIO()
    if by == "exif" and turn != 1:
        exif = Image.Exif()
        exif[0x0112] = turn
        options["exif"] = exif
    elif by == "xmp" and turn != 1 and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.format(turn))
    elif by == "xmp" and turn != 1:
        options["xmp"] = XMP.format(turn).encode()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def oracle(data: bytes, background: tuple[int, int, int], channels: int) -> NDArray[np.int64]:
    """Turned by Pillow, composited in real numbers."""
    opened = Image.open(io.BytesIO(data))
    if channels == 1 and opened.mode == "RGB" and opened.format == "JPEG":
        opened.draft("L", opened.size)  # its own luma plane
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I"):
        level = np.asarray(picture).astype(np.int64) >> 8
        pixels = np.repeat(level[..., None], 3, 2).astype(float)
    elif picture.mode == "CMYK":
        pixels = np.asarray(picture.convert("RGB")).astype(float)
    else:
        rgba = np.asarray(picture.convert("RGBA")).astype(float)
        alpha = rgba[..., 3:] / 255
        pixels = rgba[..., :3] * alpha + np.array(background) * (1 - alpha)
    if channels == 3:
        return np.rint(pixels).astype(np.int64)
    return np.rint(pixels @ [0.299, 0.587, 0.114])[..., None].astype(np.int64)


def seen(shards: Path, background: str, channels: int) -> NDArray[np.int64]:
    """What training sees of the first sample."""
    config = DataConfig(path=str(shards), resolution=SIDE, channels=channels, background=background, max_failure_rate=0)
    index = load_index(str(shards)) if shards.is_dir() else build_index(str(shards))
    batch = read_samples(config, index, np.array([0]))
    assert not batch.failures
    return batch.data[0].permute(1, 2, 0).numpy().astype(np.int64)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    kind = draw(st.sampled_from(list(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    few = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, (2, 3, 4), np.uint8)
    # Smooth, for the formats that keep little else.
    noise = np.asarray(Image.fromarray(few, "RGBA").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    options: dict[str, Any] = {}
    if mode == "I;16":
        picture = Image.fromarray(noise[..., 0].astype(np.uint16) * 256 + noise[..., 1])
    else:
        picture = Image.fromarray(noise, "RGBA").convert(mode)
    if mode in ("P", "L", "RGB", "1") and kind == "PNG" and draw(st.booleans()):
        options["transparency"] = {"P": 3, "L": int(noise[0, 0, 0]), "RGB": tuple(noise[0, 0, :3].tolist()), "1": 0}[
            mode
        ]
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True} if draw(st.booleans()) else {"quality": 90}
    if kind == "JPEG":
        options["quality"] = 90
    return kind, encode(picture, kind, draw(st.integers(1, 8)), draw(st.sampled_from(["exif", "xmp"])), **options)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files(), st.sampled_from(list(COLORS)), st.sampled_from([1, 3]), st.sampled_from(list(EXTENSIONS.values())))
def test_every_way_in_gives_what_pillow_reads(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes], color: str, channels: int, extension: str
) -> None:
    kind, data = file
    folder = tmp_path_factory.mktemp("image")
    expected = oracle(data, COLORS[color], channels)
    # Another build of libjpeg, and rounding after each of composition and luma.
    near = 2

    write_tar(folder / "tar" / "a.tar", {f"0.{extension}": data})  # named as it may be in crawled sets
    assert np.abs(seen(folder / "tar" / "a.tar", color, channels) - expected).max() <= near

    (folder / "images").mkdir()
    (folder / "images" / f"0.{extension}").write_bytes(data)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr(f"0.{extension}", data)
    lossless = kind == "PNG" or is_lossless_webp(data)
    for name, source, resolution in (
        ("kept", "images", None), ("zipped", "images.zip", None), ("resized", "images", SIDE),
    ):  # fmt: skip
        pack(folder / source, folder / name, resolution=resolution, background=color, workers=1)
        found = seen(folder / name, color, channels)
        # Where JPEG or lossy WebP had to be encoded anew it comes back by some levels, but lies as it did.
        error = np.abs(found - expected)
        assert (error.max() <= near) if lossless else (error.mean() <= 12), name


def test_metadata_after_other_segments_is_found() -> None:
    picture = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) * 3)
    plain = encode(picture, "JPEG", 1, "exif")
    assert not has_metadata(plain)
    turned = encode(picture, "JPEG", 6, "exif")
    assert has_metadata(turned)
    # A large APP13 segment (Photoshop's) before it, and fill bytes.
    late = turned[:2] + b"\xff\xed\xff\xff" + bytes(0xFFFD) + b"\xff\xed\xff\xff" + bytes(0xFFFD) + b"\xff" + turned[2:]
    assert has_metadata(late)
    assert Image.open(io.BytesIO(late)).getexif()[0x0112] == 6
    assert not has_metadata(plain[:2])
    assert has_metadata(b"\xff\xd8no marker at all")


@pytest.mark.parametrize("resolution", [None, SIDE])
def test_a_late_orientation_turns_the_same_with_and_without_a_resolution(
    tmp_path: Path, resolution: int | None
) -> None:
    stripes = np.zeros((SIDE, SIDE), np.uint8)
    stripes[: SIDE // 2] = 255  # bright above
    turned = encode(Image.fromarray(stripes), "JPEG", 6, "exif", quality=100)
    late = turned[:2] + b"\xff\xed\xff\xff" + bytes(0xFFFD) + turned[2:]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(late)
    pack(tmp_path / "images", tmp_path / "out", resolution=resolution, workers=1)
    found = seen(tmp_path / "out", "white", 1)[..., 0]
    # Orientation 6: the 0th row is the right side.
    assert found[:, SIDE // 2 :].min() > 200
    assert found[:, : SIDE // 2].max() < 50


def test_hidden_colors_are_not_trained_on_and_are_counted(tmp_path: Path) -> None:
    magenta = Image.new("RGBA", (SIDE, SIDE), (255, 0, 255, 0))
    (tmp_path / "images").mkdir()
    for number in range(3):
        magenta.save(tmp_path / "images" / f"{number}.png")
    Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 255)).save(tmp_path / "images" / "opaque.png")
    for background, resolution, said in ((None, None, "transparency of 3 images"), (None, SIDE // 2, "3 transparent")):
        report = pack(
            tmp_path / "images", tmp_path / f"{resolution}", background=background, resolution=resolution, shuffle=False
        )
        assert len([note for note in report.notes if said in note]) == 1
    assert seen(tmp_path / "None", "white", 3).min() == 255
    assert seen(tmp_path / "None", "black", 3).max() == 0
    pack(tmp_path / "images", tmp_path / "black", background="black", shuffle=False)
    assert seen(tmp_path / "black", "white", 3).max() == 0
    assert "no color" in refusal(partial(pack, background="blackish"), tmp_path / "images", tmp_path / "x")


def test_lossless_webp_stays_lossless(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2 * SIDE, SIDE, 3), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(noise).save(tmp_path / "images" / "0.webp", lossless=True)
    pack(tmp_path / "images", tmp_path / "out", resolution=SIDE, workers=1)
    assert np.array_equal(seen(tmp_path / "out", "white", 3), noise[SIDE // 2 : -SIDE // 2])


@pytest.mark.parametrize(("highest", "told"), [(4095, True), (65_535, False)])
def test_values_of_fewer_bits_than_their_type_are_told_of(tmp_path: Path, highest: int, told: bool) -> None:
    values = np.linspace(0, highest, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    (tmp_path / "images").mkdir()
    Image.fromarray(values).save(tmp_path / "images" / "0.png")
    report = pack(tmp_path / "images", tmp_path / "out", workers=1)
    assert [f"{highest:,} of 65,535" in note for note in report.notes] == [True] * told


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (SIDE, SIDE)).save(folder / name)
    return folder


def test_splits_are_not_classes(tmp_path: Path) -> None:
    said = refusal(pack, images(tmp_path / "set", "train/cat/0.png", "val/cat/0.png"), tmp_path / "out")
    assert "train, val" in said
    assert f"{tmp_path / 'set'}/train" in said
    report = pack(images(tmp_path / "real", "test/0.png", "rest/0.png"), tmp_path / "out")
    assert report.class_names == ("rest", "test")


def test_class_folders_without_an_image_are_named(tmp_path: Path) -> None:
    folder = images(tmp_path / "set", "a/0.png", "c/deep/0.png")
    for name in ("b", "d/deeper"):
        (folder / name).mkdir(parents=True)
    report = pack(folder, tmp_path / "out")
    assert report.class_names == ("a", "c")
    assert any("2 folders" in note and "b, d" in note for note in report.notes)


def test_labels_with_gaps_are_told_of(tmp_path: Path) -> None:
    folder = images(tmp_path / "set", "0.png", "1.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [["0.png", 1.0], ["1.png", 3]]}))
    report = pack(folder, tmp_path / "out")
    assert report.num_classes == 4
    assert any("label 0, 2:" in note for note in report.notes)
    (folder / "dataset.json").write_text(json.dumps({"labels": [["0.png", 1.5], ["1.png", 3]]}))
    assert "label of 0.png: found 1.5" in refusal(pack, folder, tmp_path / "two")
    (folder / "dataset.json").write_text(json.dumps({"labels": [["img/0.png", 0], ["img/1.png", 1]]}))
    assert "img/0.png" in refusal(pack, folder, tmp_path / "two")


def test_links_are_followed_when_asked(tmp_path: Path) -> None:
    images(tmp_path / "elsewhere", "cats/0.png", "dogs/1.png")
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("cats", "dogs"):
        (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "dogs" / "again").symlink_to(folder)
    said = refusal(pack, folder, tmp_path / "out")
    assert "2 links" in said
    assert "--follow-links" in said
    report = pack(folder, tmp_path / "out", follow_links=True)
    assert (report.samples, report.class_names) == (2, ("cats", "dogs"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a/0.bmp", ["1 .bmp"]), ("shards.tar.gz", ["distgan index", "decompress"]), ("one.png", ["distgan pack"])],
)
def test_what_is_no_source_is_named_for_what_it_is(tmp_path: Path, name: str, parts: list[str]) -> None:
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x1f\x8b" + bytes(100))
    said = refusal(pack, tmp_path / "set" if "/" in name else path, tmp_path / "out")
    assert all(part in said for part in parts)
