from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distgan.config import GeneratorConfig
from distgan.errors import UserError
from distgan.inference import export as exports
from distgan.inference.export import export, load_generator
from distgan.inference.generator import Generator
from distgan.inference.sample import sample
from distgan.networks.layers.virtual_batch_norm import reference_moments, set_reference

DESCRIPTION: dict[str, Any] = {
    "format": "distgan generator",
    "version": 1,
    "generator": {"width": 4, "latent_size": 8},
    "resolution": 16,
    "channels": 1,
    "class_names": ["a", "b"],
    "class_counts": [3, 0],
    "step": 5,
    "images": 80,
    "data_fingerprint": "f",
    "versions": {"torch": "2"},
}

TEXT = {
    "generator": {"architecture": "characters", "normalization": "none", "width": 4},
    "kind": "text",
    "resolution": 0,
    "channels": 0,
    "length": 8,
    "vocabulary": ["\ufffd", "`", "a"],
    "class_names": None,
    "class_counts": None,
}
VIRTUAL = {"normalization": "virtual", "reference_size": 3}
PROGRESSIVE = {"architecture": "progressive", "normalization": "none"}


def write(folder: Path, description: Any = DESCRIPTION, *, weights_of: dict[str, Any] = DESCRIPTION) -> Path:
    folder.mkdir()
    text = description if isinstance(description, str) else json.dumps(description)
    (folder / "config.json").write_text(text)
    network = Generator(weights_of, GeneratorConfig(**weights_of["generator"])).network
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_reads_back_and_is_exported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source")
    generator = load_generator(source)
    assert (generator.num_classes, generator.class_names, generator.step) == (2, ["a", "b"], 5)
    images = generator(generator.latents(2), generator.labels(2))
    assert images.shape == (2, 1, 16, 16)
    assert not images.requires_grad
    target = tmp_path / "here" / "out"
    target.mkdir(parents=True)
    monkeypatch.chdir(target)
    for overwrite in (False, True):
        assert export(source, ".", overwrite=overwrite) == Path(".")
        os.chdir(target)
        assert torch.equal(load_generator(target)(generator.latents(2), generator.labels(2)), images)
        assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_missing_labels_are_asked_for_with_a_call_that_draws_them(tmp_path: Path) -> None:
    generator = load_generator(write(tmp_path / "source"))
    with pytest.raises(UserError, match=r"for example generator\.labels\(5, seed=0\)"):
        generator(generator.latents(5))
    assert generator(generator.latents(5), generator.labels(5, seed=0)).shape[0] == 5


def test_an_export_brings_its_reference_batch(tmp_path: Path) -> None:
    settings = {**DESCRIPTION["generator"], "normalization": "virtual", "reference_size": 6}
    description = {**DESCRIPTION, "generator": settings}
    network = Generator(description, GeneratorConfig(**settings)).network
    set_reference(network, torch.rand(6, 8), torch.zeros(6, dtype=torch.int64))
    source = write(tmp_path / "source", description)
    safetensors.torch.save_file(network.state_dict(), source / "model.safetensors")
    latents, labels = torch.rand(3, 8), torch.tensor([0, 1, 0])
    with reference_moments(network):
        expected = network(latents, labels)
    export(source, tmp_path / "out")
    for generator in (load_generator(source), load_generator(tmp_path / "out")):
        torch.testing.assert_close(generator(latents, labels), expected)
    (source / "config.json").write_text(json.dumps({**description, "generator": {**settings, "reference_size": None}}))
    with pytest.raises(UserError, match=r"generator\.reference_size: found null"):
        load_generator(source)


def test_an_earlier_export_is_replaced_only_on_request(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source"), write(tmp_path / "target", {**DESCRIPTION, "step": 1})
    before = content(target)
    with pytest.raises(UserError, match=r"target: holds an earlier export.*--overwrite"):
        export(source, target)
    assert content(target) == before
    export(source, target, overwrite=True)
    assert load_generator(target).step == 5


@pytest.mark.parametrize("config", ['{"format": "other"}', '{"model_type": "gpt2"}', "[" * 100_000, "[]", "{", None])
def test_a_folder_of_somebody_elses_model_is_left_alone(tmp_path: Path, config: str | None) -> None:
    source = write(tmp_path / "source")
    foreign = write(tmp_path / "foreign", config or "")
    if config is None:
        (foreign / "config.json").unlink()
    before = content(foreign)
    with pytest.raises(UserError, match="foreign: exists and is not an export"):
        export(source, foreign)
    assert content(foreign) == before


def test_an_export_that_cannot_be_published_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "source"), write(tmp_path / "target", {**DESCRIPTION, "step": 1})
    before = content(target)
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(UserError, match=r"target: .*: No space left"):
            export(source, target, overwrite=True)
    assert content(target) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
    # The earlier one is removed only when the new one is in place.
    monkeypatch.setattr(exports.shutil, "rmtree", lambda path, ignore_errors: None)  # type: ignore[attr-defined]
    export(source, target, overwrite=True)
    assert content(next(tmp_path.glob(".target.*.old"))) == before
    assert load_generator(target).step == 5


def test_an_empty_destination(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        export(tmp_path, "")
    with pytest.raises(UserError, match="--out is empty"):
        sample(tmp_path, "")
    with pytest.raises(UserError, match="SOURCE is empty"):
        load_generator("")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"resolution": 16.0}, "resolution = 16.0"),
        ({"resolution": 17}, "17 is not a power of two"),
        ({"resolution": 4}, "config.json: data.resolution = 4: the dcgan generator "),
        ({"generator": {"normalization": "virtual"}}, "generator.reference_size"),
        ({"resolution": "16"}, "resolution = '16'"),
        ({"resolution": 10**5000}, "not the description"),
        ({"channels": -1}, "channels = -1"),
        ({"generator": {"latent_size": 10**12}}, "generator.latent_size"),
        ({"generator": {"latent_size": 2**16, "width": 2**16, "max_width": 2**16}}, "weights"),
        ({"generator": {"widht": 4}}, "did you mean 'width'"),
        ({"generator": 5}, "generator = 5"),
        ({"class_names": 5}, "class_names = 5"),
        ({"class_names": ["a"]}, "as many as class_counts"),
        ({"class_names": ["a", 2]}, "class_names.1 = 2"),
        ({"class_counts": [3, -1]}, "class_counts.1 = -1"),
        ({"class_counts": [0, 0]}, "sum is not in"),
        ({"class_counts": []}, "class_counts"),
        ({"class_counts": None, "class_names": None}, "weights"),
        ({"growth": {"level": 2, "fade": 1.0}}, "architecture dcgan does not grow"),
        ({"generator": PROGRESSIVE, "growth": {"level": 3, "fade": 1.0}}, "level 3 is above the resolution"),
        ({"generator": PROGRESSIVE, "growth": {"level": -1, "fade": 1.0}}, "growth.level = -1"),
        ({"generator": PROGRESSIVE, "growth": {"level": 0, "fade": 0}}, "growth.fade = 0"),
        ({"generator": PROGRESSIVE, "growth": {"level": 0, "fade": float("nan")}}, "growth.fade"),
        ({"kind": "points"}, "kind: points needs dimensions"),
        ({"dimensions": 2}, "kind: images needs resolution and channels"),
        ({"kind": "sounds"}, "kind = 'sounds'"),
        (TEXT | {"length": 0}, "kind: text needs length and vocabulary"),
        (TEXT | {"length": 2**40}, "length"),
        (TEXT | {"vocabulary": None}, "kind: text needs length and vocabulary"),
        (TEXT | {"vocabulary": ["a", "b"]}, "vocabulary"),
        (TEXT | {"vocabulary": ["\ufffd", "`", "\x1b[2J"]}, "vocabulary"),
        (TEXT | {"vocabulary": ["\ufffd", "`", *map(chr, range(0x4E00, 0x4E00 + 2047))]}, "2 to 2048 different"),
        (TEXT | {"generator": {}}, "dcgan does not make text"),
        (TEXT, "not the weights of this generator"),
        ({"step": -1}, "step = -1"),
        ({"versions": []}, "versions"),
        ({"version": 2}, "version = 2"),
        ({"format": "other"}, "format = 'other'"),
        ({"more": 1}, "unknown key 'more'"),
        ("[" * 100_000, "not the description"),
        ("{}", "is missing"),
        ("[]", "not the description of an exported generator: input should be"),
        ("", "generator: invalid JSON"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, dict) else str(list(value)),
)
def test_descriptions_of_strangers(tmp_path: Path, change: Any, part: str) -> None:
    if isinstance(change, dict) and change.get("resolution") == 10**5000:
        text = json.dumps(DESCRIPTION).replace('"resolution": 16', '"resolution": 1' + "0" * 5000)
    else:
        text = change if isinstance(change, str) else json.dumps({**DESCRIPTION, **change})
    with pytest.raises(UserError) as caught:
        load_generator(write(tmp_path / "export", text))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda name, value: {name: value * float("nan")}, "embedding.weight holds numbers"),
        (lambda name, value: {name: value / 0.0}, "embedding.weight holds numbers"),
        (lambda name, value: {name: value.to(torch.int8)}, "embedding.weight: found torch.int8 (2, 8)"),
        (lambda name, value: {name: value[:1]}, "embedding.weight: found torch.float32 (1, 8)"),
        (lambda name, value: {"a\n\x1b[31m": value.clone()}, "a??[31m: found torch.float32 (2, 8), "),
    ],
    ids=["nan", "infinite", "whole numbers", "shape", "name"],
)
def test_weights_of_strangers(tmp_path: Path, change: Any, part: str) -> None:
    file = write(tmp_path / "export") / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["embedding.weight"].abs_().add_(1.0)
    safetensors.torch.save_file(tensors | change("embedding.weight", tensors["embedding.weight"]), file)
    with pytest.raises(UserError) as caught:
        load_generator(tmp_path / "export")
    assert str(caught.value).startswith(f"{file}: ")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "buffer", "change", "part"),
    [
        ({}, "running_var", lambda value: -value, "a negative variance, -1"),
        ({}, "running_var", lambda value: value.index_fill(0, torch.tensor([1]), -1e-3), "a negative variance, -0.001"),
        ({}, "running_mean", lambda value: value / 0.0, "not finite"),
        (VIRTUAL, "reference_labels", lambda value: value - 1, "labels from -1"),
        (VIRTUAL, "reference_labels", lambda value: value + 2, "2 to 2, expected 0"),
        (VIRTUAL, "reference", lambda value: value + float("nan"), "not finite"),
        ({"spectral_norm": True}, "0.u", lambda value: value * 0, "a vector of length 0, expected 1"),
        ({"spectral_norm": True}, "0.v", lambda value: value * 2, "a vector of length 2, expected 1"),
    ],
)  # fmt: skip
def test_buffers_that_no_network_can_have(
    tmp_path: Path, settings: dict[str, Any], buffer: str, change: Any, part: str
) -> None:
    description = DESCRIPTION | {"generator": DESCRIPTION["generator"] | settings}
    file = write(tmp_path / "export", description, weights_of=description) / "model.safetensors"
    assert load_generator(tmp_path / "export").num_classes == 2
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name.endswith(buffer))
    safetensors.torch.save_file(tensors | {name: change(tensors[name]).contiguous()}, file)
    with pytest.raises(UserError, match=re.escape(f"{file}: ")) as caught:
        load_generator(tmp_path / "export")
    assert f"{name} holds " in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_power_iteration_vectors_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    description = DESCRIPTION | {"generator": DESCRIPTION["generator"] | {"spectral_norm": True}}
    file = write(tmp_path / "export", description, weights_of=description) / "model.safetensors"
    halved = {name: value.to(dtype) if value.is_floating_point() else value
              for name, value in safetensors.torch.load_file(file).items()}  # fmt: skip
    safetensors.torch.save_file(halved, file)
    load_generator(tmp_path / "export")


def test_weights_in_half_precision(tmp_path: Path) -> None:
    file = write(tmp_path / "export") / "model.safetensors"
    halved = {name: value.half() if value.is_floating_point() else value
              for name, value in safetensors.torch.load_file(file).items()}  # fmt: skip
    safetensors.torch.save_file(halved, file)
    generator = load_generator(tmp_path / "export")
    assert torch.equal(generator.network.get_parameter("embedding.weight"), halved["embedding.weight"].float())


def test_weights_that_are_no_regular_file(tmp_path: Path) -> None:
    weights = write(tmp_path / "export") / "model.safetensors"
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_generator(tmp_path / "export")
    os.mkfifo(weights)
    with pytest.raises(UserError, match="not a regular file"):
        load_generator(tmp_path / "export")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"seed": -1}, "--seed -1: expected a number from 0 to"),
        ({"seed": 2**63}, "2\\*\\*63 - 1"),
        ({"number": 0}, "--num 0"),
        ({"number": 10**20}, "--num 1"),
        ({"batch_size": 10**20}, "--batch-size 1"),
        ({"labels": ["²"]}, "--labels ²: expected a number"),
        ({"labels": ["9" * 5000]}, "--labels 9"),
    ],
    ids=str,
)
def test_impossible_samples(tmp_path: Path, arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        sample(write(tmp_path / "export"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_samples_mix_with_no_others(tmp_path: Path) -> None:
    export = write(tmp_path / "export")
    (tmp_path / "out").mkdir()
    sample(export, tmp_path / "out", number=3)
    with pytest.raises(UserError, match="out: the folder is not empty"):
        sample(export, tmp_path / "out", number=2)
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "webp", "gif"])
def test_samples_in_other_formats_are_no_folders(tmp_path: Path, ending: str) -> None:
    with pytest.raises(UserError, match=rf"--out .*out\.{ending}: .*\.png"):
        sample(write(tmp_path / "export"), tmp_path / f"out.{ending}")


def test_an_export_has_no_best(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/export: --best .*an export"):
        load_generator(write(tmp_path / "export"), best=True)


def test_a_generator_in_use_does_not_follow_its_file(tmp_path: Path) -> None:
    weights = write(tmp_path / "export") / "model.safetensors"
    generator = load_generator(tmp_path / "export")
    before = {name: tensor.clone() for name, tensor in generator.network.state_dict().items()}
    size = weights.stat().st_size
    with open(weights, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    for name, tensor in generator.network.state_dict().items():
        assert torch.equal(tensor, before[name])
