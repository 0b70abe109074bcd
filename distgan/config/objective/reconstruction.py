"""Loss of an autoencoder."""

from __future__ import annotations

from distgan.config.fields import NotNegative, ScheduledNotNegative, ScheduledPositive, Section


class PerceptualConfig(Section):
    """LPIPS, a perceptual distance of images of at least 16 pixels per side (Zhang et al. 2018)."""

    weights: str
    """Path of torchvision's weights of VGG16, `vgg16-397923af.pth` or its tensors as .safetensors."""
    weight: ScheduledPositive = 1.0
    """Weight of LPIPS beside the L1 distance."""


class ReconstructionConfig(Section):
    """Loss of an autoencoder (Esser et al. 2021; Rombach et al. 2022): the L1 distance of reconstructions, mean over
    pixels and channels, plus the terms below."""

    perceptual: PerceptualConfig | None = None
    """LPIPS of reconstructions; null leaves it out."""
    kl: ScheduledNotNegative = 1e-6
    """Weight of the KL divergence of posteriors from N(0, 1), summed over the elements of a latent and divided by the
    number of pixels times channels of an image. The released code sums all terms over pixels, with the same weight."""
    adversarial_weight: ScheduledPositive = 0.5
    """Weight of the adversarial term: 0.5 for `kl` latents, 0.8 in Esser et al. 2021."""
    adaptive: bool = True
    """Multiply it by the ratio of the gradient norms of the L1 distance with LPIPS and of the adversarial term, at the
    decoder's last layer. The ratio is of one micro-batch of all ranks."""
    adversarial_start_kimg: NotNegative = 0.0
    """Thousands of images after which the adversarial term enters the autoencoder's loss, and the discriminator begins
    to train."""
