"""Load an autoencoder that distgan trained, to encode and to decode with."""

from __future__ import annotations

from distgan.autoencoders.trained import TrainedAutoencoder
from distgan.errors import UserError
from distgan.inference.export import load_generator


def load_trained(path: str) -> TrainedAutoencoder:
    """Load the EMA weights of an autoencoder from a run (its newest checkpoint), a checkpoint or an export, on the CPU.

    Raises:
        UserError: there is none, or it is another generator.
    """
    generator = load_generator(path)
    if not generator.reconstructs:
        raise UserError(
            f"{path}: found a generator of architecture {generator.config.architecture}, expected an autoencoder; "
            "train one with generator.architecture=autoencoder"
        )
    return TrainedAutoencoder(generator.network, generator.config, generator.network_shape)
