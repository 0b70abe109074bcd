"""Class labels as inputs of networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def with_labels(vectors: Tensor, labels: Tensor | None, embedding: nn.Embedding | None) -> Tensor:
    """Concatenate vectors (n, d) with the embedding of their labels (n,); without one, return the vectors.

    Mirza and Osindero, "Conditional Generative Adversarial Nets", 2014.
    """
    if embedding is None:
        return vectors
    assert labels is not None, "a class-conditional network needs labels"
    return torch.cat((vectors, embedding(labels)), dim=1)


class ClassTable(nn.Module):
    """A vector per class: int64 labels (n,) to (n, size), float. Vectors start at 0.

    Unlike `nn.Embedding` it has no spectral norm in a network that has, as in the released code of BigGAN.
    """

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, size))

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"
