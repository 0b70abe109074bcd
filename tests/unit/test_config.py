from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import cache_folder, dump_config, json_schema, load_config, parse_config
from distgan.errors import UserError

MINIMAL: dict[str, Any] = {
    "run_dir": "r",
    "data": {"path": "d", "resolution": 32},
    "training": {"steps": 5, "batch_size": 8},
}

VALID = "run_dir: r\ndata: {path: d, resolution: 32}\ntraining: {steps: 5, batch_size: 8}"
"""The same as a file."""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.stepz=3", ["unknown key 'training.stepz'", "did you mean 'training.steps'"]),
        ("objective.r1={gama: 1}", ["unknown key 'objective.r1.gama'", "'objective.r1.gamma'"]),
        ("batch_size=3", ["unknown key 'batch_size'", "batch_size'?"]),
        ("xyzzy=3", ["unknown key 'xyzzy'", "accepted here: run_dir, seed, data"]),
        ("training.steps=0", ["training.steps = 0", "greater than or equal to 1"]),
        ("training.steps=yes", ["training.steps", "decimal number", "'yes'"]),
        ("training.steps=many", ["training.steps", "decimal number", "'many'"]),
        ("training.mixed_precision=fp16", ["training.mixed_precision", "fp16 is refused", "bf16"]),
        ("training.mixed_precision=fp8", ["training.mixed_precision = 'fp8'", "'no', 'tf32' or 'bf16'"]),
        (
            "training.gradient_accumulation_steps=3",
            ["training.batch_size", "does not divide", "training.gradient_accumulation_steps=3"],
        ),
        ("data.resolution=33", ["data.resolution", "33 is not a power of two"]),
        ("data.max_failure_rate=.nan", ["data.max_failure_rate", "decimal number", "'.nan'"]),
        ("seed=-1", ["seed = -1"]),
        ("generator.optimizer.betas=[0.5, 1.5]", ["generator.optimizer.betas", "1.5 is not in [0, 1)"]),
        ("objective.adversarial=wgann", ["objective.adversarial = 'wgann'", "'non_saturating'"]),
        ("growth={}", ["growth", "only networks of architecture progressive grow"]),
        ("growth={first_resolution: 6}", ["growth.first_resolution", "6 is not a power of two from 4 up"]),
        ("growth={batch_sizes: {3: 8}}", ["growth.batch_sizes", "3 is not a power of two"]),
        ("growth={stable_kimg: 0, fade_kimg: 0}", ["growth.stable_kimg", "nothing would grow"]),
        ("data=3", ["data = '3'", "a section with the keys kind, path"]),
        ("objective.r1=1", ["objective.r1 = '1'", "a section with the keys gamma, final_gamma, every"]),
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
        ("generator.depth=", ["generator.depth: expected a decimal number, found ''"]),
        ("training.compile=", ["training.compile = ''", "boolean"]),
        ("objective.label_smoothing={real: 2.0}", ["objective.label_smoothing.real"]),
        ("objective.label_smoothing={real: [0.9, 0.1]}", ["objective.label_smoothing", "[0.9, 0.1] is no range"]),
        ("objective.gradient_penalty={}", ["discriminator.normalization", "use layer or none"]),
        ("generator.architecture=mlp", ["generator.architecture", "mlp does not make images", "dcgan"]),
        ("generator.architecture=progressive", ["discriminator.architecture", "must be progressive"]),
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
        ("training=", ["training is empty; it needs: steps, batch_size"]),
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
        ("evaluation.metrics=[modes]", [".yaml: evaluation.metrics: modes does not measure images", "choose from fid"]),
        ("growth={}", [".yaml: growth: only networks of architecture progressive grow"]),
        ("objective.feature_matching.layer=", ["objective.feature_matching.layer = ''", "at least 1 character"]),
    ],
)
def test_mistakes_are_one_line_naming_key_and_fix(tmp_path: Path, override: str, parts: list[str]) -> None:
    path = write(tmp_path, yaml.safe_dump({**MINIMAL, "seed": 1}))
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.kind=points", "data.resolution: has no effect with kind: points, only with images; leave it out"),
        ("data={path: d, kind: text, channels: 1}", "data.channels: has no effect with kind: text, only with images"),
        ("data={path: d, kind: text, mirror: true}", "data.mirror: has no effect with kind: text, only with images"),
        ("data={path: d, kind: text, dimensions: 3}", "data.dimensions: has no effect with kind: text, only with po"),
        ("data={path: d, kind: points, length: 8}", "data.length: has no effect with kind: points, only with text"),
        ("data.length=8", "data.length: has no effect with kind: images, only with text"),
        ("data.lanes=64", "data.lanes: has no effect with order: permutation, only with lanes"),
        ("data.shuffle_block=64", "data.shuffle_block: has no effect with order: permutation, only with lanes"),
        (
            "generator.depth=3",
            "generator.depth: has no effect with architecture: dcgan, only with characters or mlp or",
        ),
        ("generator={architecture: mlp, max_width: 8}", "generator.max_width: has no effect with architecture: mlp"),
        ("discriminator={architecture: characters, max_width: 8}", "discriminator.max_width: has no effect with arch"),
        ("generator.reference_size=8", "generator.reference_size: has no effect with normalization: synchronized, on"),
        ("discriminator.pooling=mean", "discriminator.pooling: has no effect with architecture: dcgan, only with res"),
        (
            "discriminator={architecture: resnet, minibatch_discrimination: {}}",
            "discriminator.minibatch_discrimination: has no effect with architecture: resnet, only with dcgan or mlp",
        ),
        (
            "discriminator={architecture: mlp, minibatch_stddev: {}}",
            "discriminator.minibatch_stddev: has no effect with architecture: mlp, only with dcgan or progressive",
        ),
        (
            "generator.optimizer={name: rmsprop, betas: [0.0, 0.9]}",
            "generator.optimizer.betas: has no effect with name: rmsprop, only with adam; leave it out, or change name",
        ),
        ("generator.optimizer.alpha=0.9", "generator.optimizer.alpha: has no effect with name: adam, only w"),
        (
            "objective={adversarial: hinge, label_smoothing: {}}",
            "objective.label_smoothing: has no effect with adversarial: hinge, only with non_saturating or minimax",
        ),
        (
            "objective.gradient_penalty={points: uniform, perturbation: 2}",
            "objective.gradient_penalty.perturbation: has no effect with points: uniform, only with gaussian",
        ),
        ("evaluation.inception_weights=w", "evaluation.inception_weights: has no effect with detector: classifier"),
    ],
)
def test_keys_without_effect_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f": {message}")) as caught:
        parse_config(MINIMAL, [override])
    assert "\n" not in str(caught.value)


def test_options_of_a_tracker_keep_their_types(tmp_path: Path) -> None:
    options = "{name: wandb, anonymous: true, n: 3, rate: 1e-3, tags: [a, 2], notes: on, group: null}"
    config = load_config(write(tmp_path, VALID + f"\nmonitoring: {{trackers: [mlflow, {options}]}}\n"))
    mlflow, wandb = config.monitoring.trackers
    assert (mlflow.name, mlflow.project, mlflow.model_extra) == ("mlflow", "distgan", {})
    expected = {"anonymous": True, "n": 3, "rate": 0.001, "tags": ["a", 2], "notes": "on", "group": None}
    assert wandb.model_extra == expected
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_key_without_effect_may_be_given_its_default() -> None:
    config = parse_config(MINIMAL, ["discriminator.pooling=sum", "generator.optimizer={alpha: 0.99}", "data.length=32"])
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
        ("objective={adversarial: wasserstein, r1: {gamma: 1}}", ["objective.r1: with discriminator.normalization="]),
        ("discriminator={spectral_norm: true, normalization: none}", []),
        ("generator={normalization: virtual, reference_size: 64}", []),
        ("generator={normalization: virtual, reference_size: 128}", ["generator.reference_size = 128: each pass"]),
    ],
)
def test_doubts(tmp_path: Path, override: str, doubts: list[str]) -> None:
    found = load_config(write(tmp_path, yaml.safe_dump(MINIMAL)), [override]).config_warnings
    assert len(found) == len(doubts)
    assert all(part in line for part, line in zip(doubts, found, strict=True))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("training: {steps: 1, steps: 2}", "the key 'steps' is given twice"),
        ("a: [", "not valid YAML"),
        ("- 1", "mapping of sections, found a list"),
        ("", "mapping of sections, found nothing"),
        ("run_dir: null", "run_dir = None: input should be a valid string"),
        ("!!python/object/apply:os.system [true]", "not valid YAML"),
        ("!!python/name:os.system : 3", "line 1: the tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("a: 1\n!x b: 3", "line 2: the tag '!x'"),
        ("run_dir: r", "missing"),
        ("run_dir: !!timestamp nonsense", "not valid YAML"),
        ("run_dir: !!int ''", "not valid YAML"),
        ("2024-01-02: 3", "unknown key '2024-01-02'"),
        ("2024-13-45: 3", "unknown key '2024-13-45'"),
        ("[a, b]: 3", "a key is not a word"),
        ("seed: " + "[" * 5000, "nested too deeply"),
        (VALID + "\nseed: " + "1" * 5000, "seed: expected a decimal number"),
        ("foo: &a [*a]", "an alias that contains itself"),
        ("foo: &a {b: *a}", "an alias that contains itself"),
        ("foo: &a {a: 1}\nbar: {<<: *a}", "line 2: merge keys (<<)"),
        ("x: {a: 1, a: 2}", "line 1: the key 'a' is given twice"),
        ("a: 1\n---\na: 2", "not valid YAML"),
        ("# " + "x" * (1 << 20), "larger than the 1048576 bytes"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_files(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(UserError, match=re.escape(part)) as caught:
        load_config(write(tmp_path, text))
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_aliases_that_unfold_into_billions_of_values(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 2, 3]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(UserError, match="more than 100000 values"):
        load_config(write(tmp_path, "\n".join(lines)))


def test_an_alias_repeats_a_section(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f"{VALID}\ngenerator: &player {{width: 32}}\ndiscriminator: *player"))
    assert (config.generator.width, config.discriminator.width) == (32, 32)


ODD_TEXTS = [
    "runs/hash #2", "#2", "a: b", "a:", "'quoted'", '"quoted"', "'half", " spaces ", "\ttab", "no", "Yes", "on", "off",
    "~", "true", "010", "0x10", "1:30", "1_000", "1e-4", ".inf", "!tag", "&anchor", "*alias", "{", "}", "[", "]",
    "{a: 1}", "[a] b", "a, b", "- a", "? a", "%YAML", "@", "`", "|", ">", "<<", "---", "a=b", "=", "2024-01-02", "\\n",
    "é\u2028ü",
]  # fmt: skip


@given(st.sampled_from(ODD_TEXTS) | st.text(max_size=30))
def test_an_override_of_a_text_key_arrives_as_typed(text: str) -> None:
    changes = [f"{key}={text}" for key in ("data.path", "data.cache_dir", "evaluation.held_out")]
    config = parse_config(MINIMAL, changes)
    if not (text.strip().startswith("[") and text.strip().endswith("]")):
        assert config.data.path == text
    for found in (config.data.cache_dir, config.evaluation.held_out):
        assert found == (None if text == "null" else text)


@given(st.sampled_from(ODD_TEXTS) | st.text(max_size=30))
def test_a_text_key_of_a_file_takes_what_yaml_quotes(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("quoted") / "recipe.yaml"
    path.write_text(f"{VALID}\n{yaml.safe_dump({'evaluation': {'held_out': text}})}", encoding="utf-8")
    assert load_config(path).evaluation.held_out == text


YAML_1_1 = ["no", "yes", "on", "off", "true", "010", "0x10", "1:30", "1_000", "1e-4", "2024-01-02"]


@pytest.mark.parametrize("word", YAML_1_1)
def test_plain_words_of_yaml_1_1_are_text(tmp_path: Path, word: str) -> None:
    assert load_config(write(tmp_path, f"{VALID}\nevaluation: {{held_out: {word}}}")).evaluation.held_out == word


NO_DECIMALS = ["010", "0123", "-01", "0x10", "0o17", "0b1", "1:30", "1_000", "1,000", "+-1", "1e", ".", "٣", "yes"]


@pytest.mark.parametrize("text", [*NO_DECIMALS, "1 #2"])
def test_numbers_of_overrides_are_decimal_or_refused(text: str) -> None:
    for override in (f"training.steps={text}", f"generator.optimizer.betas=[{text}, 0.5]", f"data.channels={text}"):
        with pytest.raises(UserError, match=re.escape(override.partition("=")[0])) as caught:
            parse_config(MINIMAL, [override])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quote", ["", "'"])
@pytest.mark.parametrize("text", NO_DECIMALS)
def test_numbers_of_files_are_decimal_or_refused(tmp_path: Path, text: str, quote: str) -> None:
    with pytest.raises(UserError, match="seed: expected a decimal number, found") as caught:
        load_config(write(tmp_path, f"{VALID}\nseed: {quote}{text}{quote}"))
    assert "\n" not in str(caught.value)


@given(st.integers(0, 2**63 - 1), st.floats(0, 1e12), st.sampled_from(["", "+"]))
def test_decimal_numbers_of_all_forms(whole: int, real: float, sign: str) -> None:
    for text in (repr(real), f"{real:e}", f"{real:.20g}", f"{real:.3E}"):
        config = parse_config(MINIMAL, [f"seed={sign}{whole}", f"ema.half_life_kimg={sign}{text}"])
        assert (config.seed, config.ema.half_life_kimg) == (whole, float(text))


def test_no_is_a_precision(tmp_path: Path) -> None:
    path = write(tmp_path, VALID.replace("steps: 5", "steps: 5, mixed_precision: no"))
    assert load_config(path).training.mixed_precision == "no"
    assert load_config(path, ["training.mixed_precision=no"]).training.mixed_precision == "no"


@pytest.mark.parametrize(("word", "value"), [("true", True), ("no", False), ("on", True), ("False", False)])
def test_booleans(tmp_path: Path, word: str, value: bool) -> None:
    path = write(tmp_path, VALID.replace("steps: 5", f"steps: 5, channels_last: {word}"))
    assert load_config(path).training.channels_last is value
    assert parse_config(MINIMAL, [f"data.mirror={word}"]).data.mirror is value


def test_overrides_leave_the_values_alone() -> None:
    before = repr(MINIMAL)
    assert parse_config(MINIMAL, ["training.steps=7", "generator.optimizer.eps=1"]).training.steps == 7
    assert repr(MINIMAL) == before


@pytest.mark.parametrize(
    ("override", "key"),
    [("training.steps=many", "training.steps"), ("generator.widht=3", "generator.widht"), ("run_dir=null", "run_dir"),
     ("objective.r1={gamma: -1}", "objective.r1.gamma"), ("data.path=null", "data.path")],
)  # fmt: skip
def test_a_wrong_override_is_named_instead_of_the_file(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"override '{override}': ")) as caught:
        load_config(write(tmp_path, VALID), ["seed=3", override])
    assert key in str(caught.value)
    assert "recipe.yaml" not in str(caught.value)


def test_the_last_override_of_a_key_counts() -> None:
    assert parse_config(MINIMAL, ["seed=1", "seed=2"]).seed == 2


def test_values_that_are_nested_deeply_are_refused() -> None:
    nested: Any = 1
    for _ in range(2000):
        nested = [nested]
    with pytest.raises(UserError, match="unknown key 'deep'"):
        parse_config({**MINIMAL, "deep": nested}, ["seed=1"])


def test_overrides_of_lists_and_mappings() -> None:
    config = parse_config(
        MINIMAL,
        ["data.path=[a, 's3://b/#1.tar']", "evaluation.metrics=[fid, kid]", "objective.r1={gamma: 1e-1}",
         "generator.optimizer.betas=[0, 0.9]", "objective.label_smoothing.real=[0.7, 0.9]", "data.channels=1",
         "growth=null",
         "training.early_stopping=null", "generator.depth=null"],
    )  # fmt: skip
    assert config.data.path == ["a", "s3://b/#1.tar"]
    assert config.evaluation.metrics == ["fid", "kid"]
    assert config.objective.r1 is not None
    assert config.objective.r1.gamma == 0.1
    assert config.generator.optimizer.betas == (0.0, 0.9)
    assert config.objective.label_smoothing is not None
    assert config.objective.label_smoothing.real == (0.7, 0.9)
    assert config.data.channels == 1


@pytest.mark.parametrize(
    "path",
    ["[ab]*.tar", "[ab]/*[0-4]", "[a", "*.tar", "{0..3}.tar", "{a,b}/*.tar", "s3://b/{000..127}.tar", "2024-13-45"],
)
def test_paths_in_overrides_need_no_quotes(tmp_path: Path, path: str) -> None:
    assert load_config(write(tmp_path, yaml.safe_dump(MINIMAL)), [f"data.path={path}"]).data.path == path


def test_folders_that_look_like_dates_or_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-mine")
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    for text, folder in {"2024-13-45": "2024-13-45", "2024-01-02": "2024-01-02", "runs/x": "runs/x",
                         "runs/hash #2": "runs/hash #2", "~/x": "/home/of-mine/x"}.items():  # fmt: skip
        assert load_config(path, [f"run_dir={text}"]).run_dir == folder


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


def test_missing_file_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the recipe first, then key=value"):
        load_config("training.steps=5")
    with pytest.raises(UserError, match="found a folder, expected a recipe; give the path"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=re.escape(f"name the recipe in it, {tmp_path}/config.yaml")):
        load_config(tmp_path)
    with pytest.raises(UserError, match="cannot read the config: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


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


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    # YAML 1.1 reads 2e-4 as text.
    config = load_config(write(tmp_path, yaml.safe_dump(MINIMAL)), ["generator.optimizer.learning_rate=2e-4"])
    assert config.generator.optimizer.learning_rate == 2e-4


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
        ("{first_resolution: 64}", "growth.first_resolution: 64 is above data.resolution = 32"),
        ("{batch_sizes: {16: 8, 64: 4}}", "growth.batch_sizes: 64 is above data.resolution = 32"),
        ("{batch_sizes: {16: 7}}", "7 at 16 does not divide into training.gradient_accumulation_steps=2 micro-batches"),
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
    for role in ("generator", "discriminator"):
        with pytest.raises(UserError, match="must be progressive as the"):
            parse_config(MINIMAL, [f"{role}={network}"])
