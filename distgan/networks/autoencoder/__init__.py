"""An autoencoder in a generator's place, and a discriminator of patches."""
