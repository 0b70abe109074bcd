"""How labels enter a network whose input is a vector (Mirza and Osindero, 2014)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def with_labels(vectors: Tensor, labels: Tensor | None, embedding: nn.Embedding | None) -> Tensor:
    """Vectors (n, d), and beside them the embedding of their labels (n,); without an embedding they stay alone."""
    if embedding is None:
        return vectors
    assert labels is not None, "a class-conditional network needs labels"
    return torch.cat((vectors, embedding(labels)), dim=1)
