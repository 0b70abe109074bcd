"""Feature matching and historical averaging against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distgan.losses.regularizers import HistoricalAverage, feature_matching


def test_feature_matching_compares_batch_means() -> None:
    real = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    fake = torch.tensor([[0.0, 0.0], [2.0, 2.0]])  # means (2, 2) and (1, 1)
    assert feature_matching(real, fake, "squared_l2").item() == pytest.approx(2.0)
    assert feature_matching(real, fake, "l1").item() == pytest.approx(1.0)
    # Other samples with the same mean match, which a distance between samples would not see.
    assert feature_matching(real, real.flip(0), "squared_l2").item() == 0.0


def test_feature_matching_keeps_positions_apart() -> None:
    real, fake = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    real[:, :, 0, 0], fake[:, :, 1, 1] = 1.0, 1.0
    assert feature_matching(real, fake, "squared_l2").item() == pytest.approx(2.0)


def test_historical_average_is_the_mean_over_time() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(2).double()), "b": nn.Parameter(torch.zeros(()).double())}
    history = HistoricalAverage(nn.ParameterDict(parameters))
    course = [{name: p.detach().clone() for name, p in parameters.items()}]
    for step in range(5):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)).double()
        history.update(torch.ones(()))
        course.append({name: p.detach().clone() for name, p in parameters.items()})
    means = {name: torch.stack([then[name] for then in course]).mean(0) for name in parameters}
    for name, expected in means.items():
        torch.testing.assert_close(history.state()[f"mean/{name}"], expected)
    assert history.state()["count"].item() == 6
    distance = history.penalty()
    expected = sum(((parameters[name] - means[name]) ** 2).sum() for name in parameters)
    torch.testing.assert_close(distance, expected)
    for name, gradient in zip(parameters, torch.autograd.grad(distance, list(parameters.values())), strict=True):
        torch.testing.assert_close(gradient, 2 * (parameters[name] - means[name]).detach())


def test_the_first_distance_is_zero_and_has_a_gradient() -> None:
    parameter = nn.Parameter(torch.ones(3))
    history = HistoricalAverage(nn.ParameterDict({"a": parameter}))
    history.penalty().backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_skipped_update_does_not_count() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    history = HistoricalAverage(nn.ParameterDict({"a": parameter}))
    with torch.no_grad():
        parameter += 1.0
    history.update(torch.zeros(()))
    assert history.state()["count"].item() == 1
    assert history.state()["mean/a"].item() == 0.0
