"""Pushes to a stand-in of the Hugging Face Hub, and what they say of the user: real HTTP, and the real client."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import distgan
from distgan import extensions
from distgan.cli import main
from distgan.config import load_config, parse_config
from distgan.errors import UserError
from distgan.inference.export import export, load_generator
from distgan.inference.publish import _recipe, _remove, publish
from distgan.inference.sample import sample
from distgan.training.loop import train
from tests.checkpoints import rewrite
from tests.hub_server import TOKEN, HubServer, Repository, hub_server
from tests.runs import recipe
from tests.unit.test_documentation import DOCS, section
from tests.unit.test_export import DESCRIPTION, TEXT, content, write

PUSHED = ["README.md", "config.json", "model.safetensors", "samples.png"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A conditional run of two steps, which says that its metrics were measured at step 2."""
    folder = tmp_path_factory.mktemp("run-of-alice")
    config = recipe(
        folder, digits, data={"labels": True, "cache_dir": str(folder / "cache")}, training={"steps": 2},
        monitoring={"every": 1},
    )  # fmt: skip
    train(load_config(config))
    file = folder / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["fid[classifier]"] = 99.0
    rows[1] |= {"fid[classifier]": 12.5, "kid[classifier]": None, "huge": 10**400, "](bad": 1.0, "Mine.of": 3}
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "fid[classifier]": 1.0}\n{"step": 2, "f'
    )
    return folder / "run"


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        publish(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_of_a_detector_are_left_out() -> None:
    path = ["evaluation", "detector", "weights"]
    assert not _remove({"evaluation": {"detector": "inception"}}, path)
    values = {"evaluation": {"detector": {"detector": "inception", "weights": "weights.pth"}}}
    assert _remove(values, path)
    assert values == {"evaluation": {"detector": {"detector": "inception"}}}


def test_a_recipe_with_an_alignment_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "configs" / "imagenet256-gat-b2.yaml"
    config = load_config(path, ["objective.alignment.weights=/home/alice/dinov2"])
    assert config.discriminator.options.alignment_size == 768
    description = SimpleNamespace(config=config.model_dump(mode="json"))
    monkeypatch.setattr("distgan.inference.publish.load_description", lambda _checkpoint: description)
    text, left_out = _recipe(Path("checkpoint"))
    assert "objective.alignment.weights" in left_out
    recipe = yaml.safe_load(text)
    recipe["data"] |= {"path": "shards", "decoder": "vae"}
    shared = parse_config({"run_dir": "run", **recipe})
    assert shared.objective.alignment is not None
    assert shared.discriminator.options == load_config(path).discriminator.options


def test_pushed_and_loaded(run: Path, tmp_path: Path, server: HubServer) -> None:
    url = publish(run, tmp_path / "out", "user/digits")
    assert url == f"{server.url}/user/digits"
    repository = server.repositories["user/digits"]
    assert not repository.private
    (first,) = repository.commits
    assert sorted(repository.commits[first]) == PUSHED == sorted(content(tmp_path / "out"))
    assert repository.commits[first] == content(tmp_path / "out")
    here, there = load_generator(run), load_generator("hf://user/digits")
    latents, labels = here.latents(3), here.labels(3)
    torch.testing.assert_close(there(latents, labels), here(latents, labels), rtol=0, atol=0)
    downloads = [request for request in server.requests if "/resolve/" in request]
    assert {request.rpartition("/")[2] for request in downloads} == {"config.json", "model.safetensors"}
    # Again, after a change: the revisions stay apart.
    publish(run, tmp_path / "out", "user/digits", overwrite=True)
    repository.commit({"config.json": (run / "checkpoints" / "latest").read_bytes()})
    repository.tags["v1"] = first
    for revision in (first, "v1"):
        torch.testing.assert_close(
            load_generator(f"hf://user/digits@{revision}")(latents, labels), here(latents, labels)
        )
    with pytest.raises(UserError, match=r"config\.json: not the description"):
        load_generator("hf://user/digits")
    sample("hf://user/digits@v1", tmp_path / "x.png", number=4)
    export("hf://user/digits@v1", tmp_path / "copy")
    assert content(tmp_path / "copy").keys() == {"config.json", "model.safetensors"}


def test_the_card(run: Path, tmp_path: Path, server: HubServer) -> None:
    publish(run, tmp_path / "out", "user/digits")
    card = (tmp_path / "out" / "README.md").read_text()
    parsed = pytest.importorskip("huggingface_hub").ModelCard(card)
    data = parsed.data.to_dict()
    assert data["library_name"] == "distgan"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    measured = {result.metric_name: result.metric_value for result in parsed.data.eval_results}
    assert measured == {"fid[classifier]": 12.5, "Mine.of": 3}
    assert {result.metric_type for result in parsed.data.eval_results} == {"fid", "Mine.of"}
    assert "![samples](samples.png)" in card
    assert "1x16x16 images of 10 classes" in card
    assert "| fid[classifier] | 12.5 |" in card
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```", card, re.MULTILINE | re.DOTALL))
    values: dict[str, Any] = {}
    exec(blocks["python"], values)
    assert values["samples"].shape == (16, 1, 16, 16)
    # The recipe is that of the run but for what is about the machine.
    original = load_config(run / "config.yaml")
    shown = yaml.safe_load(blocks["yaml"])
    whole = {**shown, "run_dir": original.run_dir, "data": {**shown["data"], "path": original.data.path}}
    again = parse_config(whole)
    for name in ("generator", "discriminator", "objective", "training", "ema", "growth", "seed"):
        assert getattr(again, name) == getattr(original, name)
    assert "`run_dir`, `monitoring`, `checkpoint`, `data.path`, `data.cache_dir`, `data.num_workers`" in card


def test_nothing_of_this_machine_is_pushed(run: Path, tmp_path: Path, server: HubServer) -> None:
    publish(run, tmp_path / "out", "user/digits")
    (files,) = server.repositories["user/digits"].commits.values()
    text = b"".join(files[name] for name in PUSHED if name != "samples.png").decode(errors="replace")
    for private in ("alice", str(tmp_path), "/tmp", str(Path.home()), TOKEN, os.uname().nodename, "run_dir:"):
        assert private not in text, private


def change(run: Path, tmp_path: Path, section: str, **values: Any) -> Path:
    """A copy of the run's checkpoint with other settings."""
    checkpoint = tmp_path / "changed" / "checkpoints" / "step-00000002"
    checkpoint.parent.mkdir(parents=True)
    (tmp_path / "changed" / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    source = run / "checkpoints" / "step-00000002"
    checkpoint.mkdir()
    for file in source.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    state = json.loads((source / "state.json").read_text())
    state["config"][section] = {**state["config"][section], **values}
    rewrite(checkpoint, "state.json", json.dumps(state).encode())
    return checkpoint


def test_settings_that_tell_of_the_user_are_left_out(run: Path, tmp_path: Path, server: HubServer) -> None:
    options = {"weights": "~/secret.pt", "api_key": "hunter2", "power": 3, "shares": {"/data/alices-part": 0.5}}
    metrics = ["fid", {"metric": "some.metrics:Mine", **options, "near": "../alices-weights.pt", "separator": "/"}]
    trackers = [{"name": "wandb", "entity": "alice-team", "project": "secret"}]
    checkpoint = change(run, tmp_path, "evaluation", metrics=metrics)
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["monitoring"]["trackers"] = trackers
    state["config"]["data"]["path"] = ["s3://alices-bucket/shards"]
    rewrite(checkpoint, "state.json", json.dumps(state).encode())
    publish(checkpoint, tmp_path / "out", "user/digits")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "power: 3" in card
    assert "separator: /" in card
    left_out = ("weights", "api_key", "shares", "near")
    assert ", ".join(f"`evaluation.metrics.1.{name}`" for name in left_out) in card
    for private in ("secret.pt", "hunter2", "alice", "wandb"):
        assert private not in card


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Writes an export of points by a network of the user's own, with a text as its option `weights`."""
    site = tmp_path / "site"
    site.mkdir()
    sys.modules.pop("mine", None)
    (site / "mine.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n"
        "    def __init__(self, shape, latent_size, weights: str = ''): super().__init__(latent_size, 2)\n"
        "    def forward(self, latents, labels): return super().forward(latents)\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(extensions, "_packages", {"mine"})
    monkeypatch.setattr(extensions, "_paths", set())
    points = {"kind": "points", "dimensions": 2, "resolution": 0, "channels": 0}
    unlabeled = {"class_names": None, "class_counts": None}

    def write_own(weights: str) -> Path:
        generator = {"architecture": "mine:Net", "latent_size": 8, "weights": weights}
        description = {**DESCRIPTION, **points, **unlabeled, "generator": generator}
        return write(tmp_path / "own", description, weights_of=description)

    yield write_own
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("path", ["/home/alice/x.pt", "~/x.pt", "s3://alice/x.pt", "C:\\Users\\alice", "a=/home/alice"])
def test_a_generator_with_a_path_is_not_pushed(
    tmp_path: Path, server: HubServer, own: Callable[[str], Path], path: str
) -> None:
    said = refused(own(path), tmp_path / "out", "user/x")
    assert said.startswith("generator.weights: holds a path")
    assert "alice" not in said
    assert not server.repositories


def test_a_generator_of_ones_own_code(tmp_path: Path, server: HubServer, own: Callable[[str], Path]) -> None:
    publish(own("large"), tmp_path / "out", "hf://user/points")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'distgan.load_generator("hf://user/points", trust_code=["mine"])' in card
    assert "pipeline_tag" not in card
    extensions._packages.clear()
    extensions._paths.clear()
    with pytest.raises(UserError, match="--allow mine"):
        load_generator("hf://user/points")
    assert load_generator("hf://user/points", trust_code=["mine"]).shape.dimensions == 2


def test_a_generator_of_text_and_an_export_without_its_run(tmp_path: Path, server: HubServer) -> None:
    description = {**DESCRIPTION, **TEXT}
    publish(write(tmp_path / "source", description, weights_of=description), tmp_path / "out", "user/text")
    assert sorted(server.repositories["user/text"].resolve("main") and content(tmp_path / "out")) == PUSHED[:3]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "lines of 8 characters" in card
    assert "Not measured" in card
    assert "## Recipe" not in card
    assert len(re.findall(r"^    .{0,8}$", card, re.MULTILINE)) >= 16
    assert load_generator("hf://user/text").vocabulary == TEXT["vocabulary"]


def test_a_private_repository(tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source")
    publish(source, tmp_path / "out", "user/hidden", private=True)
    assert server.repositories["user/hidden"].private
    assert load_generator("hf://user/hidden").step == 5
    publish(source, tmp_path / "out", "user/hidden", private=True, overwrite=True)
    server.repositories["user/shown"] = Repository()
    said = refused(source, tmp_path / "shown", "user/shown", private=True)
    assert "user/shown: exists and is public" in said
    assert not server.repositories["user/shown"].commits
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"hf://user/hidden: cannot be downloaded: there is no such repo"):
        load_generator("hf://user/hidden")


def test_pushes_that_fail_keep_the_export(tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write(tmp_path / "source"), tmp_path / "out"
    again = f"the export is kept in {target}; to push again, add --overwrite"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = refused(source, target, "user/gan")
    assert "your token does not reach it" in said
    assert again in said
    assert "hf_wrong" not in said
    assert load_generator(target).step == 5
    monkeypatch.delenv("HF_TOKEN")
    said = refused(source, target, "user/gan", overwrite=True)
    assert "no token; run `hf auth login`, or set HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = refused(source, target, "somebody/gan", overwrite=True)
    assert "your token may not do this" in said
    assert not server.repositories
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's attempts
    server.cut = 100
    said = refused(source, target, "user/gan", overwrite=True)
    assert "user/gan: cannot be pushed: " in said
    assert "check the network" in said
    assert not server.repositories["user/gan"].commits
    server.cut = None
    server.shutdown()
    server.socket.close()
    said = refused(source, target, "user/gan", overwrite=True)
    assert "ConnectError" in said
    assert again in said
    assert load_generator(target).step == 5


@pytest.mark.parametrize("repository", ["x", "user/gan/v1", "--user/gan", "https://hub/user/gan", ""])
def test_names_that_are_none(tmp_path: Path, repository: str) -> None:
    with pytest.raises(UserError, match="expected"):
        publish(write(tmp_path / "source"), tmp_path / "out", repository)
    assert "leave out @v1" in refused(tmp_path / "source", tmp_path / "out", "user/gan@v1")
    assert not (tmp_path / "out").exists()


def test_the_page(run: Path, tmp_path: Path, server: HubServer) -> None:
    """Its commands in processes of their own, which the client's variables tell of the stand-in."""
    text = section(DOCS / "quickstart.md", "6. Share it").replace("USER/NAME", "user/gan")
    environment = {
        **os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits-dcgan").symlink_to(run)
    commands = re.findall(r"^```sh\ndistgan (.*)\n```", text, re.MULTILINE)
    for command, said in zip(commands, (f"{server.url}/user/gan", "theirs.png"), strict=True):
        done = subprocess.run(
            [sys.executable, "-m", "distgan", *shlex.split(command)], env=environment, cwd=tmp_path,
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{said}\n"
        assert "Traceback" not in done.stderr
    assert (tmp_path / "theirs.png").stat().st_size > 100
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    values: dict[str, Any] = {"distgan": distgan}
    exec(block, values)
    assert values["generator"].step == 2
    (copy,) = re.findall(r"`distgan (export hf://.*)`", text)
    main([part if part != "copy" else str(tmp_path / "copy") for part in shlex.split(copy)])
    assert load_generator(tmp_path / "copy").step == 2


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, part in (
        (["--private"], "--private is about --push"),
        (["--push", "user/gan", "--format", "torch-export"], "leave out --format"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(tmp_path), str(tmp_path / "other"), *options])
        assert part in capsys.readouterr().err
