"""Programs of torch.export: loaded where distgan cannot be imported, and networks that cannot be traced."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from distgan import extensions
from distgan.cli import main
from distgan.config import GeneratorConfig
from distgan.errors import UserError
from distgan.inference import torch_export
from distgan.inference.export import load_generator
from distgan.inference.generator import Generator
from distgan.inference.torch_export import export_program
from distgan.networks.layers.virtual_batch_norm import set_reference, uses_reference
from tests.unit.test_documentation import DOCS, section

LAB = Path(__file__).parents[1] / "plugins"
BASE = {"format": "distgan generator", "version": 1, "step": 5, "images": 80, "data_fingerprint": "f", "versions": {}}
IMAGES, POINTS = {"resolution": 16, "channels": 1}, {"kind": "points", "dimensions": 2}
TEXT = {"kind": "text", "length": 8, "vocabulary": ["\ufffd", "`", "a"]}
PLAIN: dict[str, Any] = {"normalization": "none"}
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dcgan": ({"spectral_norm": True}, IMAGES),
    "dcgan-virtual": ({"normalization": "virtual", "reference_size": 5}, IMAGES),
    "resnet": ({}, {"resolution": 32, "channels": 3}),
    "progressive": (PLAIN, IMAGES),
    "progressive-low": (PLAIN, {**IMAGES, "growth": {"level": 0, "fade": 1.0}}),
    "progressive-fading": (PLAIN, {**IMAGES, "growth": {"level": 1, "fade": 0.3}}),
    "r3gan": ({**PLAIN, "width": 16}, IMAGES),
    "stylegan2": ({"latent_distribution": "normal", "mapping_layers": 2}, {**IMAGES, "resolution": 8}),
    "mlp": ({}, POINTS),
    "characters": ({**PLAIN, "spectral_norm": True}, TEXT),
    "lab.nets:Generator": ({"hidden": 8}, IMAGES),
}
BOTH = ("dcgan", "resnet", "progressive", "r3gan", "mlp", "lab.nets:Generator")
CASES = [(name, 0) for name in (*BOTH, "characters", "progressive-low")] + [
    (name, 3) for name in (*BOTH, "dcgan-virtual", "progressive-fading", "stylegan2")
]
LOAD = """
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("distgan", "lab"):
            raise ModuleNotFoundError(f"{name} is not here", name=name)

sys.meta_path.insert(0, Blocked())
import torch
torch.manual_seed(0)
for file in sorted(Path(sys.argv[1]).glob("*.pt2")):
    extra = {"generator.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    known = json.loads(extra["generator.json"])
    inputs = torch.load(file.with_suffix(".inputs"), weights_only=True)
    outputs = [program(*given) for given in inputs]
    assert [list(output.shape[1:]) for output in outputs] == [known["output_shape"][1:]] * len(outputs)
    assert all(given[0].shape[1] == known["latent_size"] for given in inputs)
    assert all(len(given) == 1 + bool(known["num_classes"]) for given in inputs)
    torch.save(outputs, file.with_suffix(".outputs"))
assert not {"distgan", "lab"} & sys.modules.keys()
"""


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(LAB))
    monkeypatch.setattr(extensions, "_packages", {"lab"})
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        del sys.modules[name]


def write(folder: Path, name: str, classes: int = 0) -> Path:
    """An export of a network that is not as it was initialized."""
    options, sizes = NETWORKS[name]
    architecture = name.partition("-")[0]
    small = {} if ":" in name else {"width": 4}
    config = GeneratorConfig.model_validate({"architecture": architecture, "latent_size": 8, **small, **options})
    counts = [1, 2, 3][:classes] or None
    description = {**BASE, "generator": config.model_dump(mode="json"), "class_names": None, "class_counts": counts}
    network = Generator({**description, **sizes}, config).network
    torch.manual_seed(0)
    for key, tensor in network.state_dict().items():
        if key.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif key.endswith(("gain", "bias", "strength")):
            tensor.normal_(std=0.3)
    if uses_reference(network):
        set_reference(network, torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1]) if classes else None)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**description, **sizes}))
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def test_programs_run_where_distgan_cannot_be_imported(tmp_path: Path) -> None:
    expected: dict[str, list[Tensor]] = {}
    for name, classes in CASES:
        source = write(tmp_path / "exports" / f"{name}-{classes}", name, classes)
        file = export_program(source, tmp_path / f"{name}-{classes}.pt2")
        generator = load_generator(source)
        inputs = [
            [part for part in generator.inputs(number, seed=number) if part is not None] for number in (1, 2, 5, 33)
        ]
        torch.save(inputs, file.with_suffix(".inputs"))
        expected[file.stem] = [generator(*given) for given in inputs]
    # -I: without the current folder, PYTHONPATH and the user's packages.
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert loaded.returncode == 0, loaded.stderr
    assert len(expected) == len(CASES) == 17
    for stem, outputs in expected.items():
        found = torch.load(tmp_path / f"{stem}.outputs", weights_only=True)
        torch.testing.assert_close(found, outputs)
        assert outputs[-1].std() > 1e-3, stem


def test_the_description_says_what_to_feed(tmp_path: Path) -> None:
    file = export_program(write(tmp_path / "source", "dcgan", 3), tmp_path / "new" / "x.pt2")
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("generator.json")]
        known = json.loads(archive.read(name))
        text = b"".join(archive.read(name) for name in archive.namelist())
    assert known["latent_size"] == 8
    assert known["latent_distribution"] == "U(-1, 1)"
    assert known["num_classes"] == 3
    assert known["class_counts"] == [1, 2, 3]
    assert known["output_shape"] == ["n", 1, 16, 16]
    assert known["output_range"] == [-1, 1]
    assert known["step"] == 5
    # Frames of the trace are not in it: they have paths of this machine.
    assert b".py" not in text
    assert str(tmp_path).encode() not in text


def test_a_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    source, file = write(tmp_path / "source", "mlp"), tmp_path / "x.pt2"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"x\.pt2: exists; pass another name, or add --overwrite"):
        export_program(source, file)
    assert file.read_text() == "mine"
    export_program(source, file, overwrite=True)
    with pytest.raises(UserError, match=r"x\.pt2: a program of torch\.export, which torch\.export\.load loads"):
        load_generator(file)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(UserError, match=r"folder\.pt2: exists; pass another name$"):
        export_program(source, tmp_path / "folder.pt2", overwrite=True)
    with pytest.raises(UserError, match=r"^DEST .*ends in \.pt2"):
        export_program(source, tmp_path / "x.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "x.pt2", "folder.pt2"}


def test_a_full_disk_leaves_the_earlier_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, file = write(tmp_path / "source", "mlp"), tmp_path / "x.pt2"
    file.write_text("mine")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distgan.files.os.replace", fail)
    with pytest.raises(UserError, match=r"x\.pt2: cannot write the program: No space left"):
        export_program(source, file, overwrite=True)
    assert file.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "x.pt2"}


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = section(DOCS / "quickstart.md", "5. Run it without distgan")
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "runs" / "digits-dcgan", "dcgan")
    main(shlex.split(blocks["sh"])[1:])
    values: dict[str, Any] = {}
    exec(blocks["python"], values)
    torch.testing.assert_close(values["images"], load_generator(source)(values["latents"]))


class Counting(nn.Module):
    calls = 0

    def forward(self, latents: Tensor) -> Tensor:
        self.calls += 1
        return latents * self.calls


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return 3 * values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * gradient


class Network(nn.Module):
    """Makes points by a function of latents (n, 8)."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.bias = function, nn.Parameter(torch.zeros(8))

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return self.function(latents + self.bias)


@torch.library.custom_op("distgan_tests::doubled", mutates_args=())
def doubled(values: Tensor) -> Tensor:
    return 2 * values


doubled.register_fake(torch.empty_like)


def generator_of(function: Callable[[Tensor], Tensor]) -> Generator:
    generator = load_generator(Path("mlp"))
    generator.network = Network(function).eval().requires_grad_(False)
    return generator


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda latents: latents.view(len(latents), 2, 4).flatten(1), "the number of samples becomes a constant"),
        (lambda latents: torch.stack([2 * row for row in latents]), "the number of samples becomes a constant"),
        (lambda latents: latents if latents.mean() > 0 else -latents, "data-dependent expression"),
        (lambda latents: torch.from_numpy(latents.numpy()), "numpy"),
        (Counting(), "mlp: its program computes something else"),
        (doubled, "distgan_tests.doubled.default, an operator that PyTorch alone does not have"),
    ],
    ids=["len", "loop", "branch", "numpy", "state", "operator"],
)
def test_what_cannot_be_traced_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    function: Callable[[Tensor], Tensor],
    part: str,
) -> None:
    monkeypatch.chdir(write(tmp_path / "mlp", "mlp").parent)
    generator = generator_of(function)
    monkeypatch.setattr(torch_export, "load_generator", lambda *_, **__: generator)
    with pytest.raises(UserError) as refused:
        export_program("mlp", "x.pt2")
    assert str(refused.value).startswith("mlp: ")
    assert part in str(refused.value)
    assert str(refused.value).endswith("or leave out --format torch-export")
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")
    assert not Path("x.pt2").exists()


@pytest.mark.parametrize(
    "function",
    [Tripled.apply, lambda latents: latents + torch.randn(latents.shape), nn.Dropout()],
    ids=["autograd", "noise", "dropout"],
)
def test_custom_gradients_and_noise_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor], Tensor]
) -> None:
    monkeypatch.chdir(write(tmp_path / "mlp", "mlp").parent)
    generator = generator_of(function)
    monkeypatch.setattr(torch_export, "load_generator", lambda *_, **__: generator)
    program = torch.export.load(export_program("mlp", "x.pt2")).module()
    latents = torch.randn(7, 8)
    torch.manual_seed(0)
    expected = function(latents)
    if isinstance(function, nn.Dropout):
        expected = latents
    torch.manual_seed(0)
    torch.testing.assert_close(program(latents), expected)
