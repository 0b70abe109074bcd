"""Regularization terms besides the adversarial loss (Salimans et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distgan.distributed import collectives


def feature_matching(real_features: Tensor, fake_features: Tensor, distance: str) -> Tensor:
    """|E f(x) - E f(G(z))|^2 of features (n, ...), with means over the batch of all ranks (section 3.1).

    `l1` is the mean absolute difference of the two means, as in the released code (CIFAR-10 and SVHN experiments).
    """
    difference = collectives.all_reduce_mean(real_features.mean(0) - fake_features.mean(0))
    return difference.abs().mean() if distance == "l1" else difference.square().sum()


class HistoricalAverage:
    """|theta - 1/t sum_i theta[i]|^2 of a player's parameters (section 3.3); stores one copy of them.

    theta[1] are the initial parameters and theta[i + 1] those after the i-th applied update. The current parameters
    are the last of the t. The paper does not specify this, and there is no released code.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._names = [name for name, _ in network.named_parameters()]
        self._means = [parameter.detach().clone() for parameter in self._parameters]
        self._count = torch.ones((), device=self._means[0].device)

    @property
    def _parameters(self) -> list[Tensor]:
        # Read each time, because an engine may replace the tensors.
        return list(self._network.parameters())

    def penalty(self) -> Tensor:
        """Return the squared distance, summed over all parameters and differentiable in them."""
        differences = torch._foreach_sub(self._parameters, self._means)
        return torch.stack(torch._foreach_norm(differences)).square().sum()

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Add the parameters after an update to the mean; `applied` is 0 for a skipped update, else 1."""
        self._count += applied
        change = torch._foreach_sub(self._parameters, self._means)
        torch._foreach_mul_(change, applied / self._count)
        torch._foreach_add_(self._means, change)

    @torch.no_grad()
    def restart(self) -> None:
        """Restart the mean at the current parameters."""
        torch._foreach_copy_(self._means, self._parameters)
        self._count.fill_(1.0)

    def state(self) -> dict[str, Tensor]:
        """Return the means by parameter name, and `count`, a scalar. Copy into these tensors to load a state."""
        return {f"mean/{name}": mean for name, mean in zip(self._names, self._means, strict=True)} | {
            "count": self._count
        }
