"""Label conditioning of networks with vector inputs (Mirza and Osindero, 2014)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def with_labels(vectors: Tensor, labels: Tensor | None, embedding: nn.Embedding | None) -> Tensor:
    """Concatenate vectors (n, d) with the embedding of their labels (n,); without one, return the vectors."""
    if embedding is None:
        return vectors
    assert labels is not None, "a class-conditional network needs labels"
    return torch.cat((vectors, embedding(labels)), dim=1)
