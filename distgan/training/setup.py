"""Build the training state of a run from its config on this rank's device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distgan import randomness, schedule
from distgan.autoencoders.decoding import images_of_latents, load_decoder, real_images
from distgan.config import Config, dump_config
from distgan.data.index.proportion import in_proportion
from distgan.data.index.table import Index
from distgan.data.kinds.decoding import sample_format
from distgan.data.kinds.images import JPEG_DECODER
from distgan.data.order import make_order
from distgan.data.reader import read_samples
from distgan.distributed.blocks import checkpoint_activations, declared_blocks
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError, within_memory
from distgan.evaluation.names import value_name
from distgan.extensions import code_digests
from distgan.inference.generation import ImageSource, to_network
from distgan.inference.latents import LatentSource, Source
from distgan.losses.augmentation.controller import AugmentationController
from distgan.networks import build_discriminator, build_generator
from distgan.networks.contract import PROBE_SIZE, check_networks
from distgan.networks.layers.stage import set_float32_below
from distgan.networks.layers.virtual_batch_norm import set_reference, uses_reference
from distgan.networks.moving import moving_buffers
from distgan.networks.progressive import set_growth
from distgan.networks.shape import SampleShape
from distgan.players.finite_differences import check_finite_differences, check_fractions
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.player import Player
from distgan.training.ema import EMAGenerator, Profiles
from distgan.training.micro_batches.memory import batch_memory, check_accumulation
from distgan.training.state import Progress, TrainingState, class_counts, run_shape
from distgan.version import code_digest

log = logging.getLogger("distgan")


def assemble(config: Config, index: Index, runtime: Runtime) -> TrainingState:
    """Return the training state at step 0: networks with weights from the seed, players and EMA generator.

    Collective: call on every rank.

    Raises:
        UserError: the networks do not fit the data or memory, no sample of a reference batch is readable, or a loss, a
            term or an optimizer cannot be built.
    """
    shape = run_shape(config, index)
    memory = "generator, discriminator: networks of this width, depth and resolution"
    with runtime.raise_on_all_ranks(), within_memory(memory):
        generator = build_generator(config.generator, shape, seed=config.seed).to(runtime.device)
        discriminator = build_discriminator(config.discriminator, shape, seed=config.seed).to(runtime.device)
        _fill_references(generator, discriminator, config, index)
        if (below := config.training.float32_below) is not None:
            for section, network in ((config.generator, generator), (config.discriminator, discriminator)):
                set_float32_below(network, section.architecture, below)
    growth = schedule.growth(config, 0)
    set_growth((generator, discriminator), growth)
    with runtime.raise_on_all_ranks(), within_memory(memory):
        _check_contract(generator, discriminator, config, index, runtime)
        inaccurate = check_finite_differences(discriminator, config, _first_shape(config, index))
    for warning in inaccurate if runtime.is_main else ():
        log.warning("%s", warning)
    with runtime.raise_on_all_ranks():
        decoder = load_decoder(config, shape)
    if decoder is not None:
        decoder.to(runtime.device)
        runtime.check_equal("the decoder", decoder.hash, "give every rank the same weights")
    average, profiles = EMAGenerator(generator), Profiles(generator, config.ema.profiles)
    for network in (generator, discriminator, average.network):
        # FSDP2 shards contiguous weights only.
        if uses_channels_last(config, runtime.device) and not runtime.shards_weights:
            network.to(memory_format=torch.channels_last)
    for role, network in (("generator", generator), ("discriminator", discriminator)):
        prepare_passes(role, network, config)
    precision = torch.bfloat16 if config.training.autocasts else None
    augmentation, controller = config.objective.augmentation, None
    if augmentation is not None and augmentation.chosen_probability == "adaptive":
        controller = AugmentationController(augmentation.controller, runtime.device)
    with runtime.raise_on_all_ranks():
        generator_objective = GeneratorObjective(generator, discriminator, config, precision, controller)
        discriminator_objective = DiscriminatorObjective(discriminator, generator, config, precision, controller)
    if (alignment := discriminator_objective.alignment) is not None:
        runtime.check_equal(
            "the network of objective.alignment", alignment.teacher.hash, "give every rank the same weights"
        )
    players = {
        "generator": Player(generator_objective, config.generator.optimizer, runtime),
        "discriminator": Player(
            discriminator_objective,
            config.discriminator.optimizer,
            runtime,
            clipping=config.objective.weight_clipping,
        ),
    }
    average.shard()
    profiles.shard()
    if runtime.shards_weights:
        _check_shards(players.values(), runtime)
    engine = players["generator"].engine
    if config.growth and not config.growth.reset_optimizers and not engine.regroups_moments:
        raise UserError(
            f"growth.reset_optimizers = false: {engine.name} cannot keep the moments of parameters that join at "
            "different times; set growth.reset_optimizers=true, or launch with --multi_gpu or --use_fsdp",
            everywhere=True,
        )
    state = TrainingState(
        config,
        index,
        players["generator"],
        players["discriminator"],
        average,
        profiles,
        Progress(),
        growth,
        controller,
        decoder,
    )
    with batch_memory(config, runtime.world_size):
        state.warm_up_buckets()
    return state


def prepare_passes(role: str, network: nn.Module, config: Config) -> None:
    """Compile a network or its blocks, and have the blocks' activations recomputed, as the config says.

    Raises:
        UserError: it has no blocks, or recomputing them would not give the same activations.
    """
    training, blocks = config.training, declared_blocks(network)
    key, fix = "training.activation_checkpointing = true", "set it to false"
    if not training.activation_checkpointing:
        key, fix = "training.compile = blocks", "set it to true or false"
    if not blocks and (training.activation_checkpointing or training.compile == "blocks"):
        raise UserError(
            f"{key}: {role}.architecture = {getattr(config, role).architecture} declares no blocks; {fix}, choose "
            "another network, or give yours an attribute blocks",
            everywhere=True,
        )
    if training.activation_checkpointing:
        moving = {id(buffer) for buffer in moving_buffers(network)}
        for block in blocks:
            what = "virtual batch norm, whose reference moments are not there" if uses_reference(block) else None
            if any(id(buffer) in moving for buffer in block.buffers()):
                what = "buffers that move in each pass, as spectral norm's vectors, and would move again"
            if what is not None:
                raise UserError(
                    f"{key}: the blocks of the {role} have {what} in the recomputation; {fix}, or turn that off",
                    everywhere=True,
                )
            checkpoint_activations(block)
    if training.compile:
        _guard_frozen_weights()
    for compiled in blocks if training.compile == "blocks" else [network] if training.compile else []:
        compiled.compile()


def _guard_frozen_weights() -> None:
    """Have compiled code check which weights are frozen in each call.

    torch 2.10 leaves that check out, and runs the code of the frozen opponent in the player's own update: the blocks
    then get no gradients. Newer versions default to this setting.
    """
    from torch._dynamo import config as settings  # importing the compiler takes seconds

    if hasattr(settings, "use_recursive_dict_tags_for_guards"):
        settings.use_recursive_dict_tags_for_guards = False


def _check_shards(players: Iterable[Player], runtime: Runtime) -> None:
    """Say which networks are not sharded by block although they could be.

    Raises:
        UserError: a player of blocks has a historical average.
    """
    for player in players:
        cause = player.objective.whole_weights
        if cause is None or not declared_blocks(player.network):
            continue
        if player.history is not None:
            raise UserError(
                f"objective.historical_averaging.{player.role}: keeps a second copy of all weights on each rank, and "
                f"{player.engine.name} shards them by block; set it to 0, or launch with --multi_gpu",
                everywhere=True,
            )
        if runtime.is_main:
            log.info("%s: sharded as a whole, because %s needs all weights at once", player.role, cause)


def _check_contract(
    generator: nn.Module, discriminator: nn.Module, config: Config, index: Index, runtime: Runtime
) -> None:
    """Check the networks if one of them is the user's."""
    if config.generator.is_built_in and config.discriminator.is_built_in:
        return
    places = torch.arange(PROBE_SIZE)
    latents, labels = latent_source(config, index, runtime.device).draw("contract", places)
    shape, noise = _first_shape(config, index), None
    if config.objective.reconstruction is not None:
        images = randomness.uniform(config.seed, "contract/images", places.to(runtime.device), shape.sizes)
        latents, noise = 2.0 * images - 1.0, latents
    names = (f"generator {config.generator.architecture}", f"discriminator {config.discriminator.architecture}")
    compares = bool(config.discriminator.facts.batch_statistics)
    check_networks(generator, discriminator, shape, latents, labels, names, noise=noise, compares_batch=compares)


def _first_shape(config: Config, index: Index) -> SampleShape:
    """Return the shape of samples at the first level of growth."""
    return replace(run_shape(config, index), resolution=schedule.resolution(config, 0))


def latent_source(config: Config, index: Index, device: torch.device, *, seed: int | None = None) -> LatentSource:
    """Return the source of this run's latents and labels. Without a seed, it is that of the config."""
    counts = class_counts(index) if config.data.labels else None
    seed = config.seed if seed is None else seed
    return LatentSource(config.generator, seed, class_counts=counts, device=device)


def evaluation_source(config: Config, index: Index, device: torch.device) -> Source:
    """Return the source of what the EMA generator maps to samples: latents, or images that it reconstructs."""
    if config.objective.reconstruction is not None:
        return ImageSource(config, index, device)
    return latent_source(config, index, device)


def uses_channels_last(config: Config, device: torch.device) -> bool:
    """Return True if convolutions run in channels_last. `auto` enables it where it was measured to be faster."""
    if config.data.kind not in ("images", "latents"):
        return False
    if config.training.channels_last != "auto":
        return config.training.channels_last
    if config.data.channels == 1:
        return False
    return device.type == "cuda" or config.training.autocasts


def validate_run(config: Config, index: Index, world_size: int) -> None:
    """Raise UserError if config, data and number of processes cannot train together."""
    sample_format(config.data, index)
    if config.reads_images:
        images_of_latents(config, index)
    check_accumulation(config, world_size)
    accumulation = config.training.accumulation
    batches = {"training.batch_size": config.training.batch_size}
    if config.training.generator_batch_size is not None:
        batches["training.generator_batch_size"] = config.training.generator_batch_size
    if config.growth is not None:
        batches |= {f"growth.batch_sizes.{side}": batch for side, batch in config.growth.batch_sizes.items()}
    for key, batch in batches.items():
        if batch // accumulation % world_size:
            raise UserError(
                f"{key} = {batch} with training.gradient_accumulation_steps = {accumulation} does not divide among "
                f"{world_size} processes; set a multiple of {world_size * accumulation}"
            )
        if key != "training.generator_batch_size":  # penalties are the discriminator's
            check_fractions(config, batch // accumulation // world_size)
    if config.data.labels and not index.num_classes:
        if index.sources:
            raise UserError(
                "data.labels = true: the sources of data.path have no labels, or not the same classes; pack all of "
                "them from folders of the same class names, or set data.labels=false"
            )
        raise UserError(
            "data.labels = true: the shards have no labels; pack them from class folders, or set data.labels=false"
        )


def validate_evaluation(config: Config, index: Index) -> None:
    """Raise UserError if images are missing, or a metric or detector of the evaluations refuses by its `validate`."""
    if not config.evaluation.every:
        return
    reals = in_proportion(index if config.data.decoder is None else real_images(config, index)[1])
    named = [(value_name(metric), metric) for metric in config.metrics]
    for name, section in (*named, *((detector.label, detector) for detector in config.detectors)):
        validate: Callable[..., None] | None = getattr(section.load(), "validate", None)
        if validate is not None:
            offers = {**section.arguments, "config": config, "index": reals, "name": name}
            with section.blaming("validate failed"):
                validate(**{key: offers[key] for key in offers.keys() & signature(validate).parameters.keys()})


def check_files(config: Config) -> None:
    """Raise UserError if a file that the evaluations read does not exist. Only rank 0 reads them."""
    named = [(value_name(metric), metric) for metric in config.metrics]
    for name, section in (*named, *((detector.label, detector) for detector in config.detectors)):
        for key in ("weights", "real_statistics") if section.is_built_in and config.evaluation.every else ():
            given = section.arguments.get(key)
            if given is not None and not Path(given).expanduser().exists():
                raise UserError(f"{name}: {key} = {given}: no such file; correct the path, or remove {key}")


def _fill_references(generator: nn.Module, discriminator: nn.Module, config: Config, index: Index) -> None:
    """Fill the reference batches of virtual batch norm: addressed latents, and the first reals of the stream."""
    if uses_reference(generator):
        count = len(generator.get_buffer("reference"))
        source = latent_source(config, index, generator.get_buffer("reference").device)
        set_reference(generator, *source.draw("reference batch", torch.arange(count)))
    if uses_reference(discriminator):
        places = np.arange(len(discriminator.get_buffer("reference")))
        batch = read_samples(config.data, index, make_order(config.data, config.seed, index).samples(places))
        reals = to_network(run_shape(config, index), batch.data, config.seed, torch.from_numpy(places))
        set_reference(discriminator, reals, batch.labels if config.data.labels else None)


def check_ranks_agree(config: Config, index: Index, runtime: Runtime) -> None:
    """Raise UserError if ranks differ in config, code, data or JPEG decoder. Collective: call on every rank."""
    runtime.check_equal("the config", dump_config(config), "launch every rank with the same config and overrides")
    runtime.check_equal("the code", code_digest(), "install the same version on every node")
    for package, digest in code_digests(config.code_paths).items():
        runtime.check_equal(f"the code of the package {package}", digest, "install the same version on every node")
    if index.has_jpegs:
        runtime.check_equal("the JPEG decoder", JPEG_DECODER, "install the same version of simplejpeg on every node")
    runtime.check_equal("the data's fingerprint", index.fingerprint, "give every node the same shards and index")
