"""The commands as a user runs them, one after the other, and what they say to mistakes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distgan.checkpoint.contents import load_description
from distgan.checkpoint.loading import find_checkpoint, load_sets
from distgan.cli import main
from distgan.config import parse_config
from distgan.data.index.loading import load_index
from distgan.data.index.saving import save_index
from distgan.evaluation.samples import read_reals
from distgan.inference.export import load_generator
from distgan.inference.probe import View
from distgan.inference.publish import model_card
from distgan.networks.representation import convolution_features
from tests.commands import mistake, output
from tests.labelled_shards import pictures, write_shards
from tests.ranks import Job
from tests.runs import differing, recipe, rows, status, tensors
from tests.shards import build_index

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A finished conditional run of a few steps with everything on."""
    folder = tmp_path_factory.mktemp("commands")
    config = recipe(
        folder, digits,
        data={"labels": True, "mirror": True, "order": "lanes", "lanes": 3, "shuffle_block": 64},
        training={"steps": 4, "batch_size": 16, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"},
        generator={"latent_distribution": "normal"},
        monitoring={"every": 2, "samples_every": 2, "num_samples": 9, "tensorboard": True},
        evaluation={"every": 4, "num_samples": 300, "cache_dir": str(folder / "cache")},
    )  # fmt: skip
    assert Job(2, ["train", str(config)]).wait() == [0, 0]
    return folder / "run"


def test_help_names_every_command() -> None:
    result = subprocess.run([sys.executable, "-m", "distgan", "--help"], capture_output=True, text=True, check=True)
    commands = "pack index train trace sample evaluate probe export stop status doctor schema"
    for command in commands.split():
        assert f"\n    {command} " in result.stdout
        page = subprocess.run(
            [sys.executable, "-m", "distgan", command, "--help"], capture_output=True, text=True, check=True
        )
        assert len(page.stdout) > 150
    heavy = (
        "import sys; from distgan.cli.parser import build_parser; build_parser(); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0


def test_a_run_folder_holds_what_the_readme_says(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "tensorboard", "samples", "checkpoints", "status.json",
    }  # fmt: skip
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    assert newest.name == "step-00000004"
    assert {path.name for path in newest.iterdir()} >= {
        "state.json", "layout.json", "manifest.json",
        *(f"{name}.{part}-of-2.safetensors" for part in (1, 2) for name in (
            "generator", "discriminator", "generator_ema", "generator_optimizer", "discriminator_optimizer",
        )),
    }  # fmt: skip
    assert status(run)["outcome"] == "finished"
    found = {row["step"]: row for row in rows(run)}
    assert sorted(found) == [0, 2, 4]
    assert found[4]["fid[classifier]"] > 0
    assert {"loss/generator", "loss/discriminator", "gradient_norm/generator", "speed/images_per_second"} <= set(
        found[2]
    )
    assert found[4]["images"] == 4 * 2 * 16
    assert Image.open(run / "samples" / "step-00000004.png").size[0] >= 3 * 16


def test_tensorboard_has_the_curves_grids_and_paths(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), {"images": 0}).Reload()
    assert {"loss/generator", "fid[classifier]"} <= set(events.Tags()["scalars"])
    for tag, columns, height in (("samples", 3, 3), ("interpolation", 8, 4)):
        pictures = events.Images(tag)
        assert [picture.step for picture in pictures] == [0, 2, 4]
        assert (pictures[0].width, pictures[0].height) == (columns * 18 - 2, height * 18 - 2)


def test_the_resolved_config_trains_the_same_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tensors(run, 4)
    main(["train", str(run / "config.yaml")])
    assert all(torch.equal(value, before[name]) for name, value in tensors(run, 4).items())
    assert sorted(row["step"] for row in rows(run)) == [0, 2, 4]


def test_trace_says_what_each_rank_reads(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(recipe(tmp_path, digits))
    alone = [json.loads(line) for line in output(capsys, "trace", config, "--steps", "3:5").splitlines()]
    shared = [
        json.loads(line) for line in output(capsys, "trace", config, "--steps", "3:5", "--world-size", "4").splitlines()
    ]
    # Two updates of 16 a step; the first update of step 3 begins at 3 * 2 * 16.
    assert [line["position"] for line in alone] == list(range(96, 96 + 64))
    assert {(line["position"], line["key"]) for line in alone} == {(line["position"], line["key"]) for line in shared}
    for step in (3, 4):
        assert [sum(line["rank"] == rank for line in shared if line["step"] == step) for rank in range(4)] == [8] * 4
    shard = alone[0]["shard"]
    with tarfile.open(digits / shard) as tar:
        assert any(name.split(".")[0] == alone[0]["key"] for name in tar.getnames())
    assert "expected A:B" in mistake(capsys, "trace", config, "--steps", "5")


def test_sample_from_run_checkpoint_and_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = tmp_path / "exported"
    assert output(capsys, "export", str(run), str(exported)).strip() == str(exported)
    assert {path.name for path in exported.iterdir()} == {"config.json", "model.safetensors"}
    pictures = []
    for number, source in enumerate((run, run / "checkpoints" / "step-00000004", exported)):
        out = tmp_path / f"{number}.png"
        assert output(capsys, "sample", str(source), "--num", "6", "--seed", "3", "--out", str(out)).strip() == str(out)
        pictures.append(np.asarray(Image.open(out)))
    assert all(np.array_equal(pictures[0], other) for other in pictures[1:])
    folder = tmp_path / "folder"
    output(
        capsys, "sample", str(exported), "--num", "5", "--batch-size", "2", "--labels", "3", "7", "--out", str(folder)
    )
    assert sorted(path.name for path in folder.iterdir()) == [f"{number:06d}.png" for number in range(5)]
    assert "expected a number from 0 to 9" in mistake(
        capsys, "sample", str(exported), "--labels", "ten", "--out", str(folder)
    )


def test_an_exported_generator_is_two_lines_away(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, "export", str(run), str(tmp_path / "exported"))
    code = (
        "import distgan, sys\n"
        f"generator = distgan.load_generator({str(tmp_path / 'exported')!r})\n"
        "images = generator(generator.latents(4, seed=1), generator.labels(4, seed=1))\n"
        "assert images.shape == (4, 1, 16, 16) and images.abs().max() <= 1\n"
        "assert generator.class_names[3] == '3' and generator.num_classes == 10\n"
        "assert 'accelerate' not in sys.modules and 'tensorboard' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    weights = safetensors.torch.load_file(tmp_path / "exported" / "model.safetensors")
    average = load_sets(run / "checkpoints" / "step-00000004", ["generator_ema"])["generator_ema"]
    learned = [name for name in average if "running" not in name]
    assert all(torch.equal(weights[name], average[name]) for name in learned)
    assert (weights["layers.0.running_var"] != 1).any(), "batch-norm statistics belong to the export"


def test_a_merged_checkpoint_is_plain_and_is_one_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    assert output(capsys, "merge", str(run), "--out", str(merged)).strip() == str(merged)
    plain = {path.name.partition(".")[0]: safetensors.torch.load_file(path) for path in merged.glob("*.1-of-1.*")}
    found = {f"{name}/{key}": value for name, of in plain.items() for key, value in of.items()}
    assert differing(found, tensors(run, 4)) == []
    for source in (run, merged):
        output(capsys, "sample", str(source), "--num", "4", "--out", str(tmp_path / f"{source.name}.png"))
    assert (tmp_path / "merged.png").read_bytes() == (tmp_path / "run.png").read_bytes()
    assert "exists; remove it" in mistake(capsys, "merge", str(run), "--out", str(merged))


def test_a_program_computes_what_the_run_does(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "digits.pt2"
    main(["export", str(run), str(file), "--format", "torch-export"])
    assert capfd.readouterr() == (f"{file}\n", "")
    program, generator = torch.export.load(file).module(), load_generator(run)
    given = generator.inputs(6, seed=3)
    torch.testing.assert_close(program(*given), generator(*given))


def test_a_model_card_has_the_metrics_of_the_run(run: Path) -> None:
    logged = next(row["fid[classifier]"] for row in rows(run) if row["step"] == 4)
    card = model_card(load_generator(run), "user/digits", find_checkpoint(run), pictured=True)
    assert f"| fid[classifier] | {logged:.6g} |" in card


def test_evaluate_gives_what_training_logged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = next(row["fid[classifier]"] for row in rows(run) if row["step"] == 4)
    measured = json.loads(output(capsys, "evaluate", str(run)))
    assert measured["fid[classifier]"] == pytest.approx(logged, rel=1e-4)
    assert measured["step"] == 4
    fewer = json.loads(output(capsys, "evaluate", str(run), "evaluation.num_samples=200"))
    assert fewer["generated"] == 200
    assert fewer["fid[classifier]"] != measured["fid[classifier]"]
    every = "evaluation.metrics=[inception_score,kid,classes,fid]"
    found = json.loads(output(capsys, "evaluate", str(run), every))
    assert found["fid[classifier]"] == pytest.approx(measured["fid[classifier]"], rel=1e-9)
    assert 1 <= found["inception_score[classifier]"] <= 10
    assert 1 <= found["classes[classifier]"] <= 10
    assert found["kid[classifier]"] > 0
    truncated = json.loads(output(capsys, "evaluate", str(run), "--truncation", "0.5"))
    assert truncated.keys() == {"step", "generated", "fid[classifier,truncation=0.5]"}
    assert truncated["fid[classifier,truncation=0.5]"] != pytest.approx(measured["fid[classifier]"], rel=1e-3)
    wide = json.loads(output(capsys, "evaluate", str(run), "--truncation", "9"))
    assert wide["fid[classifier,truncation=9.0]"] == pytest.approx(measured["fid[classifier]"], rel=1e-3)
    assert "truncation = 0.0: expected a number above 0" in mistake(capsys, "evaluate", str(run), "--truncation", "0")


def test_evaluate_against_published_statistics(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mean that is moved by 1,000 along one feature dominates the distance: about its square."""
    file = tmp_path / "moved.npz"
    np.savez(file, mu=np.eye(64)[0] * 1000, sigma=np.eye(64))
    found = json.loads(output(capsys, "evaluate", str(run), "--real-statistics", str(file), "--truncation", "0.9"))
    name = "fid[classifier,real=moved,truncation=0.9]"
    assert found == {"step": 4, "generated": 300, name: pytest.approx(1e6, rel=0.2)}
    said = mistake(capsys, "evaluate", str(run), "--real-statistics", str(file), "evaluation.metrics=[fid,kid]")
    assert "kid compares with the samples themselves" in said
    said = mistake(capsys, "evaluate", str(run), "--real-statistics", str(tmp_path / "absent.npz"))
    assert "absent.npz: not a readable .npz archive: No such file" in said


def test_a_probed_discriminator_normalizes_as_in_training(run: Path) -> None:
    """On as many images as a batch holds, its features are those of one batch in training."""
    found = find_checkpoint(run)
    state = load_description(found)
    config = parse_config(state.config)
    view, index = View(found, state, config), load_index(config.data.path)
    view.batch_size = 64
    numbers = torch.arange(view.batch_size)
    view.fit_statistics(index, numbers)
    features, _ = view.parts(index, numbers)
    [reals] = read_reals(config.data, index, [numbers])
    training = view.network.train()
    expected = convolution_features(training, *view.inputs(reals))
    np.testing.assert_allclose(features.features, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_probe_tells_how_much_a_discriminator_knows(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(output(capsys, "probe", str(run), "--num", "400"))
    assert found == {
        "classifier": "svm", "training_samples": 400, "test_samples": 359,
        "features": 16 * (4 + 8), "accuracy/features": found["accuracy/features"],
        "pixels": 16 * 16, "accuracy/pixels": found["accuracy/pixels"],
    }  # fmt: skip
    # Four steps have taught it little, but its layers look at what the pixels show.
    assert 0.6 < found["accuracy/features"] <= 1
    assert 0.85 < found["accuracy/pixels"] <= 1
    other = json.loads(
        output(capsys, "probe", str(run), "--num", "200", "--test", str(digits), "--classifier", "logistic")
    )
    assert (other["training_samples"], other["test_samples"]) == (200, 200)
    assert other["accuracy/pixels"] > 0.8
    assert "--num 3: expected at least 10" in mistake(capsys, "probe", str(run), "--num", "3")
    unlabeled = write_shards(tmp_path / "unlabeled", pictures(30), labels=False)
    save_index(build_index(unlabeled), unlabeled)
    assert "images of no classes" in mistake(capsys, "probe", str(run), "--data", unlabeled)
    three = write_shards(tmp_path / "three", pictures(30))
    save_index(build_index(three), three)
    assert "the classes differ" in mistake(capsys, "probe", str(run), "--test", three)


def test_evaluate_refuses_changes_that_it_would_not_heed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("data.resolution=32", "data.channels=3", "data.labels=false", "generator.width=8", "training.steps=9")
    for change in changes:
        key, _, value = change.partition("=")
        said = mistake(capsys, "evaluate", str(run), change)
        assert f"{key} = {value.capitalize()}:" in said
    assert "RUN_OR_CHECKPOINT is empty" in mistake(capsys, "evaluate", "")


def test_a_checkpoint_that_does_not_fit_is_refused_and_unharmed(
    run: Path, tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(run / "config.yaml")
    before = tensors(run, 4)
    other = tmp_path / "other"
    output(capsys, "pack", "builtin:digits", str(other), "--resolution", "16", "--seed", "5")
    for change, parts in {
        "generator.width=8": ["step-00000004: generator: ", "run_dir"],
        f"data.path={other}": ["fingerprint", "--accept data"],
        "seed=8": ["seed = 7", "--accept seed"],
        "training.batch_size=32": ["training.batch_size: checkpoint 16, now 32 (", "--accept batch"],
        "training.gradient_accumulation_steps=1": ["batch statistics", "--accept statistics"],
    }.items():
        said = mistake(capsys, "train", config, change, "training.steps=6")
        for part in parts:
            assert part in said
    after = tensors(run, 4)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_cannot_run_code(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle in place of weights is refused, and never loaded."""
    import shutil

    class Bomb:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "exploded"), "w"))

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    target = copy / "checkpoints" / "step-00000004" / "generator_ema.2-of-2.safetensors"
    target.write_bytes(pickle.dumps(Bomb()))
    for step in (copy / "checkpoints").glob("step-*"):
        if step.name != "step-00000004":
            shutil.rmtree(step)
    assert "no valid checkpoint" in mistake(capsys, "sample", str(copy), "--out", str(tmp_path / "x.png"))
    assert not (tmp_path / "exploded").exists()
