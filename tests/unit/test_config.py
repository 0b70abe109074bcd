"""The sections and keys of a recipe: mistakes, keys without effect, what is filled in, and what reads back equal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import dump_config, json_schema, load_config, parse_config
from distgan.errors import UserError
from distgan.files import cache_folder
from distgan.training.warnings import config_warnings
from tests.configs import MINIMAL, VALID, write


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.stepz=3", ["unknown key 'training.stepz'", "did you mean 'training.steps'"]),
        ("objective.r1={gama: 1}", ["unknown key 'objective.r1.gama'", "'objective.r1.gamma'"]),
        ("batch_size=3", ["unknown key 'batch_size'", "did you mean 'training.batch_size'?"]),
        ("steps=3", ["unknown key 'steps'", "did you mean 'training.steps'?"]),
        ("xyzzy=3", ["unknown key 'xyzzy'", "accepted here: run_dir, seed, data"]),
        ("training.steps=0", ["training.steps = 0", "greater than or equal to 1"]),
        ("training.steps=yes", ["training.steps", "decimal number", "'yes'"]),
        ("training.steps=many", ["training.steps", "decimal number", "'many'"]),
        ("training.mixed_precision=fp16", ["training.mixed_precision", "fp16 is refused", "bf16"]),
        ("training.mixed_precision=fp8", ["training.mixed_precision = 'fp8'", "'no', 'tf32' or 'bf16'"]),
        ("training.mixed_precision={dtype: bf16}", ["'training.mixed_precision.float32_below' is missing"]),
        ("training.mixed_precision={dtype: tf32, float32_below: 8}", ["mixed_precision.dtype = 'tf32'", "'bf16'"]),
        (
            "training.mixed_precision={float32_below: 8}",
            ["float32_below: generator.architecture: dcgan has no stages", "choose r3gan"],
        ),
        (
            "training.gradient_accumulation_steps=3",
            ["training.batch_size", "does not divide", "training.gradient_accumulation_steps=3"],
        ),
        ("data.resolution=33", ["data.resolution", "33 is not a power of two"]),
        ("data.max_failure_rate=.nan", ["data.max_failure_rate", "decimal number", "'.nan'"]),
        ("seed=-1", ["seed = -1"]),
        ("generator.optimizer.betas=[0.5, 1.5]", ["generator.optimizer.betas.1 = 1.5", "less than 1"]),
        ("generator.optimizer.betas=[0, {start: 0.9, end: 1}]", ["generator.optimizer.betas.1 = 1", "less than 1"]),
        ("generator.optimizer.learning_rate={start: -1, end: 0}", ["learning_rate = -1", "greater than or equal to 0"]),
        ("generator.optimizer.learning_rate={start: 1}", ["'generator.optimizer.learning_rate.end' is missing"]),
        ("ema.half_life_kimg={start: 1, end: 1}", ["ema.half_life_kimg.start: equals end", "write 1"]),
        ("objective.r1={gamma: {start: 1, end: 0, shape: cos}}", ["r1.gamma.shape = 'cos'", "'linear' or 'cosine'"]),
        ("objective.r1={gamma: {start: 1, end: 0, over: 0}}", ["objective.r1.gamma.over = 0", "greater than 0"]),
        ("training.steps=null", ["training.steps: missing", "or in thousands of images with kimg"]),
        ("objective.adversarial=wgann", ["objective.adversarial.family: 'wgann' is not known", "non_saturating"]),
        ("growth={}", ["growth", "set both architectures to progressive"]),
        ("growth={first_resolution: 6}", ["growth.first_resolution", "6 is not a power of two from 4 up"]),
        ("growth={batch_sizes: {3: 8}}", ["growth.batch_sizes", "3 is not a power of two"]),
        ("growth={stable_kimg: 0, fade_kimg: 0}", ["growth.stable_kimg", "nothing would grow"]),
        ("data=3", ["data = '3'", "a section with the keys kind, path"]),
        ("objective.r1=1", ["objective.r1 = '1'", "a section with the keys gamma, every"]),
        ("objective.r1=", ["objective.r1 is empty; it needs: gamma"]),
        ("monitoring.trackers=wandb", ["monitoring.trackers = 'wandb'", "a list such as [a, b]"]),
        ("monitoring.trackers=[tensorboard]", ["monitoring.trackers.0.name = 'tensorboard'", "'wandb', 'mlflow'"]),
        ("monitoring.trackers=[{project: x}]", ["'monitoring.trackers.0.name' is missing"]),
        ("monitoring.trackers=[[wandb]]", ["monitoring.trackers.0", "a section with the keys name, project"]),
        ("monitoring.trackers=[wandb, wandb]", ["monitoring.trackers: wandb is named twice"]),
        ("monitoring.trackers=[{name: aim, run_name: x}]", ["monitoring.trackers.0.run_name", "wandb or mlflow"]),
        ("evaluation.metrics=fid", ["evaluation.metrics = 'fid'", "a list such as [a, b]"]),
        ("evaluation.metrics=", ["evaluation.metrics = ''", "a list"]),
        ("generator.optimizer.betas=0.5", ["generator.optimizer.betas = '0.5'", "a list such as [0.5, 0.9]"]),
        ("generator.width=", ["generator.width: expected a decimal number, found ''"]),
        ("generator.architecture=dcgna", ["generator.architecture: 'dcgna' is not known; did you mean dcgan?"]),
        ("generator.widht=3", ["generator.widht: no option of architecture: dcgan; did you mean 'width'?"]),
        ("training.compile=", ["training.compile: expected true, false or blocks, found ''"]),
        ("training.compile=block", ["expected true, false or blocks, found 'block'; did you mean blocks?"]),
        (
            "objective.augmentation={augmentation: diffaugment, policy: []}",
            ["objective.augmentation.policy = []: expected a list of 1 or more"],
        ),
        ("run_dir=s3://key:hidden@bucket/x", ["run_dir: 's3://bucket/x': found a user, password or port"]),
        ("run_dir=az://a:hidden@b/x", ["run_dir: 'az://b/x': found a user, password or port"]),
        ("run_dir=s3://key:a/hidden@bucket/x", ["run_dir: 's3://bucket/x': found a user, password or port"]),
        ("run_dir=https://a:hidden@host/x?sig=hidden", ["run_dir: 'https://host/x': expected a folder, or a URL"]),
        ("run_dir=s3://bucket/x?sig=hidden", ["run_dir: 's3://bucket/x': found `?`"]),
        ("run_dir=s3://bucket/x[1]", ["run_dir: 's3://bucket/x[1]': found `[`", "rename the folder"]),
        ("objective.label_smoothing={real: 2.0}", ["objective.label_smoothing.real"]),
        ("objective.label_smoothing={real: [0.9, 0.1]}", ["objective.label_smoothing", "[0.9, 0.1] is no range"]),
        ("objective.gradient_penalty={}", ["discriminator.normalization", "use layer or none"]),
        ("generator.architecture=mlp", ["generator.architecture", "mlp does not make images", "dcgan"]),
        ("generator.architecture=progressive", ["discriminator.architecture", "must grow"]),
        ("growth={}", ["growth", "progressive"]),
        ("seed.x=3", ["'seed' is not a section"]),
        ("training.steps", ["expected section.key=value"]),
        ("training.steps=[", ["training.steps", "decimal number", "'['"]),
        ("training.steps=100000000000000000000000", ["training.steps", "less than or equal to 2**40"]),
        ("training.batch_size=1000000000000", ["training.batch_size", "131072"]),
        ("generator.latent_size=1000000000000", ["generator.latent_size", "65536"]),
        ("data.lanes=1000000000000", ["data.lanes", "2**20"]),
        ("monitoring.num_samples=1000000000000", ["monitoring.num_samples", "4096"]),
        ("training.timeout_minutes=1e300", ["training.timeout_minutes", "less than or equal to 1000000"]),
        ("data.cache_gigabytes=1.0e+300", ["data.cache_gigabytes"]),
        ("training={steps: 1000000000000, batch_size: 65536, critic_steps: 1000}", ["training.steps", "2**62"]),
        ("seed=9223372036854775808", ["seed = 9223372036854775808", "less than or equal to 2**63 - 1"]),
        ("seed=2024-99-99", ["seed", "decimal number", "'2024-99-99'"]),
        ("seed=" + "9" * 5000, ["seed", "decimal number"]),
        ("seed=0x" + "f" * 5000, ["seed", "decimal number"]),
        ("evaluation.metrics=" + "[" * 5000, ["override 'evaluation.metrics=[", "not a YAML value"]),
        ("evaluation.metrics=" + "[" * 50 + "]" * 50, ["nested more than 32 deep"]),
        ("evaluation.metrics=[fid] # kid", ["not a YAML value", "nothing behind the closing bracket"]),
        ("evaluation.metrics=[fid, kid # both]", ["not a YAML value"]),
        ("objective.r1={gamma: 1, gamma: 2}", ["'gamma' is given twice"]),
        ("objective.r1={gamma: !!int 010}", ["tag"]),
        ("training=", ["training is empty; it needs: batch_size"]),
        ("generator=null", ["generator is empty; give it a key, or leave it out"]),
        ("training.channels_last=7", ["training.channels_last = 7"]),
        ("run_dir=", ["run_dir: '' is not the path"]),
        ("run_dir= ", ["run_dir: ' ' is not the path"]),
        ("run_dir=a\0b", ["run_dir: 'a\\x00b' is not the path"]),
        ("run_dir=~nobody-of-this-name/x", ["run_dir", "no such home folder"]),
        (
            "discriminator.minibatch_stddev={group_size: 3}",
            ["discriminator.minibatch_stddev.group_size", "3 does not divide the micro-batch of 8 samples"],
        ),
        (
            "discriminator={minibatch_stddev: {}, normalization: virtual, reference_size: 6}",
            ["discriminator.reference_size: 6", "multiple of minibatch_stddev.group_size=4", "micro-batch of 8"],
        ),
        ("evaluation.metrics=[modes]", ["evaluation.metrics: modes does not measure images", "choose from fid"]),
        ("growth={}", ["growth: found networks that do not grow"]),
        ("objective.feature_matching.layer=", ["objective.feature_matching.layer = ''", "at least 1 character"]),
    ],
)
def test_mistakes_are_one_line_naming_key_and_fix(tmp_path: Path, override: str, parts: list[str]) -> None:
    path = write(tmp_path, yaml.safe_dump({**MINIMAL, "seed": 1}))
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert "hidden" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("override", "key", "cause", "others"),
    [
        ("data.kind=points", "data.resolution", "kind: points", ["images"]),
        ("data={path: d, kind: text, channels: 1}", "data.channels", "kind: text", ["images"]),
        ("data={path: d, kind: text, mirror: true}", "data.mirror", "kind: text", ["images"]),
        ("data={path: d, kind: text, dimensions: 3}", "data.dimensions", "kind: text", ["points"]),
        ("data={path: d, kind: points, length: 8}", "data.length", "kind: points", ["text"]),
        ("data.length=8", "data.length", "kind: images", ["text"]),
        ("data.lanes=64", "data.lanes", "order: permutation", ["lanes"]),
        ("data.shuffle_block=64", "data.shuffle_block", "order: permutation", ["lanes"]),
        ("generator.depth=3", "generator.depth", "architecture: dcgan", ["r3gan", "characters", "mlp"]),
        (
            "generator={architecture: mlp, max_width: 8}",
            "generator.max_width",
            "architecture: mlp",
            ["dcgan", "resnet", "progressive", "r3gan"],
        ),
        (
            "discriminator={architecture: characters, max_width: 8}",
            "discriminator.max_width",
            "architecture: characters",
            ["dcgan", "resnet", "progressive", "r3gan"],
        ),
        ("generator.reference_size=8", "generator.reference_size", "normalization: synchronized", ["virtual"]),
        ("discriminator.pooling=mean", "discriminator.pooling", "architecture: dcgan", ["resnet"]),
        (
            "discriminator={architecture: resnet, minibatch_discrimination: {}}",
            "discriminator.minibatch_discrimination",
            "architecture: resnet",
            ["dcgan", "mlp"],
        ),
        (
            "discriminator={architecture: mlp, minibatch_stddev: {}}",
            "discriminator.minibatch_stddev",
            "architecture: mlp",
            ["dcgan", "progressive"],
        ),
        (
            "generator.optimizer={name: rmsprop, betas: [0.0, 0.9]}",
            "generator.optimizer.betas",
            "name: rmsprop",
            ["adam"],
        ),
        ("generator.optimizer.alpha=0.9", "generator.optimizer.alpha", "name: adam", ["rmsprop"]),
        (
            "objective={adversarial: hinge, label_smoothing: {}}",
            "objective.label_smoothing",
            "adversarial: hinge",
            ["non_saturating", "minimax"],
        ),
        (
            "objective.gradient_penalty={points: uniform, perturbation: 2}",
            "objective.gradient_penalty.perturbation",
            "points: uniform",
            ["gaussian"],
        ),
        ("evaluation.detector.weights=w", "evaluation.detector.weights", "detector: classifier", ["inception"]),
    ],
)
def test_keys_without_effect_are_refused(override: str, key: str, cause: str, others: list[str]) -> None:
    """The line names the key, the setting that it has no effect with, and those that it has one with."""
    with pytest.raises(UserError) as caught:
        parse_config(MINIMAL, [override])
    message = str(caught.value).removeprefix(f"override {override!r}: ").removeprefix("config: ")
    assert "\n" not in message
    assert message.startswith(f"{key}: ")
    _, found = message.split(cause)
    assert re.findall("|".join(map(re.escape, others)), found.partition(";")[0]) == others


def test_options_of_a_tracker_keep_their_types(tmp_path: Path) -> None:
    options = "{name: wandb, anonymous: true, n: 3, rate: 1e-3, tags: [a, 2], notes: on, group: null}"
    config = load_config(write(tmp_path, VALID + f"\nmonitoring: {{trackers: [mlflow, {options}]}}\n"))
    mlflow, wandb = config.monitoring.trackers
    assert (mlflow.name, mlflow.project, mlflow.model_extra) == ("mlflow", "distgan", {})
    expected = {"anonymous": True, "n": 3, "rate": 0.001, "tags": ["a", 2], "notes": "on", "group": None}
    assert wandb.model_extra == expected
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_key_without_effect_may_be_given_its_default() -> None:
    config = parse_config(MINIMAL, ["data.lanes=16", "data.length=32"])
    assert config == parse_config(MINIMAL)


def test_virtual_batch_norm_gets_a_reference_batch_as_large_as_a_micro_batch_of_one_device(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    changes = ["generator.normalization=virtual", "training.batch_size=24", "training.gradient_accumulation_steps=2"]
    config = load_config(path, changes)
    assert config.generator.reference_size == 12
    assert config.discriminator.reference_size is None
    assert load_config(path, [*changes, "generator.reference_size=5"]).generator.reference_size == 5
    assert load_config(path, [changes[0], "training.batch_size=4096"]).generator.reference_size == 128


@pytest.mark.parametrize(
    ("override", "doubts"),
    [
        ("objective.label_smoothing={real: 0.9}", []),
        ("objective.label_smoothing={real: 0.9, fake: 0.1}", ["no longer vanishes where there is no data"]),
        ("objective.adversarial=wasserstein", ["nothing bounds the critic's slope"]),
        ("objective={adversarial: wasserstein, weight_clipping: {}}", []),
        (
            "objective={adversarial: wasserstein, r1: {gamma: 1}}",
            ["objective.r1: with batch norm in"],
        ),
        ("discriminator={spectral_norm: true, normalization: none}", []),
        ("generator={normalization: virtual, reference_size: 64}", []),
        ("generator={normalization: virtual, reference_size: 128}", ["generator.reference_size = 128: each pass"]),
    ],
)
def test_doubts(tmp_path: Path, override: str, doubts: list[str]) -> None:
    found = list(config_warnings(load_config(write(tmp_path, yaml.safe_dump(MINIMAL)), [override])))
    assert len(found) == len(doubts)
    assert all(part in line for part, line in zip(doubts, found, strict=True))


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: object = None) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DISTGAN_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(Path, "expanduser", lambda path: no_home() if str(path).startswith("~") else path)
    for configured in (None, "~/cache"):
        with pytest.raises(UserError, match="set DISTGAN_CACHE to a writable folder"):
            cache_folder(configured)
    assert cache_folder("/cache") == Path("/cache")


@given(
    steps=st.integers(1, 10**9),
    rate=st.floats(1e-9, 1.0),
    mirror=st.booleans(),
    penalty=st.none() | st.fixed_dictionaries({"gamma": st.floats(1e-3, 1e3), "every": st.integers(1, 64)}),
    paths=st.text(max_size=20) | st.lists(st.text(max_size=20), max_size=3),
)
def test_the_resolved_config_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, steps: int, rate: float, mirror: bool, penalty: Any, paths: Any
) -> None:
    config = parse_config(
        {
            "run_dir": "r",
            "data": {"path": paths, "resolution": 64, "mirror": mirror},
            "generator": {"optimizer": {"learning_rate": rate}},
            "objective": {"r1": penalty},
            "training": {"steps": steps, "batch_size": 8},
        }
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    "discriminator",
    [
        {"minibatch_stddev": {"group_size": 4}},
        {"minibatch_stddev": {"group_size": 16}},
        {"minibatch_stddev": {"group_size": 16}, "normalization": "virtual"},
        {"minibatch_stddev": {"group_size": 4}, "normalization": "virtual", "reference_size": 12},
        {"minibatch_discrimination": {"over": "rank"}},
    ],
)
def test_comparisons_that_fit_the_batch(discriminator: dict[str, Any]) -> None:
    assert parse_config({**MINIMAL, "discriminator": discriminator}).discriminator.architecture == "dcgan"


def test_every_key_is_documented_in_the_schema() -> None:
    schema = json_schema()
    for section in (schema, *schema["$defs"].values()):
        for name, field in section["properties"].items():
            described = field if "description" in field or "$ref" not in field else schema["$defs"][field["$ref"][8:]]
            assert described.get("description"), name


def test_recipes_are_valid_and_named_after_their_file() -> None:
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        assert load_config(path).run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ("{first_resolution: 64}", r"growth\.first_resolution: 64 .*data\.resolution = 32"),
        ("{batch_sizes: {16: 8, 64: 4}}", r"growth\.batch_sizes: 64 .*data\.resolution = 32"),
        ("{batch_sizes: {16: 7}}", r"growth\.batch_sizes: 7 at 16 .*training\.gradient_accumulation_steps=2"),
    ],
)
def test_growth_that_does_not_fit(growth: str, message: str) -> None:
    network = "{architecture: progressive, normalization: none}"
    both = [f"generator={network}", f"discriminator={network}", "training.gradient_accumulation_steps=2"]
    with pytest.raises(UserError, match=message):
        parse_config(MINIMAL, [*both, f"growth={growth}"])
    config = parse_config(MINIMAL, [*both, "growth={batch_sizes: {16: 6}}"])
    assert config.growth is not None
    assert config.growth.batch_sizes == {16: 6}
    assert parse_config(config.model_dump(mode="json")) == config


def test_networks_grow_together() -> None:
    network = "{architecture: progressive, normalization: none}"
    for role, other in (("generator", "discriminator"), ("discriminator", "generator")):
        with pytest.raises(UserError, match=rf"{other}\.architecture: .*progressive"):
            parse_config(MINIMAL, [f"{role}={network}"])
