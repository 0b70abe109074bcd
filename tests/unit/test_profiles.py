"""Power-function averages: their widths, their weights over time, and averages made of their snapshots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from distgan.inference.post_hoc import Profile, fit_profile
from distgan.schedule import power_decay, power_exponent
from distgan.training.ema import Profiles


@pytest.mark.parametrize(("std", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(std: float, exponent: float) -> None:
    """Karras et al. 2024, section 3.1."""
    assert power_exponent(std) == pytest.approx(exponent, abs=0.005)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.25])
def test_the_width_is_the_standard_deviation_of_the_profile(std: float) -> None:
    """Of the density (g + 1) t^g on [0, 1], by numeric integration."""
    exponent = power_exponent(std)
    times = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = (exponent + 1) * times**exponent / 1_000_000
    mean = (density * times).sum()
    assert np.sqrt((density * (times - mean) ** 2).sum()) == pytest.approx(std, rel=1e-4)


def tracked(trajectory: list[float], std: float, batch: int) -> list[float]:
    """The average after each step, computed by hand."""
    averages, average = [], 0.0
    for step, value in enumerate(trajectory):
        decay = power_decay(std, step * batch, batch)
        average = decay * average + (1 - decay) * value
        averages.append(average)
    return averages


def test_updates_weigh_time_by_a_power() -> None:
    """The average of a trajectory t is the mean of t under the profile; the start has no weight."""
    generator = nn.Linear(1, 1, bias=False)
    profiles = Profiles(generator, (0.05, 0.1))
    steps = 2000
    for step in range(steps):
        with torch.no_grad():
            generator.weight.fill_((step + 1) / steps)
        profiles.update(step * 64, 64, torch.ones(()))
    for std in (0.05, 0.1):
        exponent = power_exponent(std)
        found = profiles.snapshot(keep=True)[f"{std}/weight"].item()
        assert found == pytest.approx((exponent + 1) / (exponent + 2), abs=1e-3)
    assert profiles.snapshot(keep=False) == {}


def test_a_skipped_update_changes_nothing() -> None:
    generator = nn.Linear(2, 2)
    profiles = Profiles(generator, (0.05, 0.1))
    before = {key: tensor.clone() for key, tensor in profiles.state().items()}
    with torch.no_grad():
        generator.weight.fill_(9.0)
    profiles.update(64, 64, torch.zeros(()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in profiles.state().items())


def test_a_tracked_average_is_returned_exactly() -> None:
    profiles = [Profile(std, images) for images in (100, 200, 300) for std in (0.05, 0.1)]
    for place, profile in enumerate(profiles):
        weights = fit_profile(profiles[: place + 1], profile).weights
        np.testing.assert_allclose(weights, np.eye(place + 1)[place], atol=1e-9)


@pytest.mark.parametrize(("std", "bound"), [(0.03, 0.1), (0.07, 0.01), (0.15, 0.02), (0.2, 0.05)])
def test_other_widths_come_close_to_a_tracked_one(std: float, bound: float) -> None:
    """Against an average of that width that was really tracked, on a smooth path with noise."""
    rng = np.random.default_rng(0)
    steps, batch, every = 6400, 32, 100
    path = np.sin(np.linspace(0, 9, steps)) + np.linspace(0, 2, steps) + 0.3 * rng.standard_normal(steps)
    averages = {of: tracked(path.tolist(), of, batch) for of in (0.05, 0.1, std)}
    times = range(every, steps + 1, every)
    profiles = [Profile(of, time * batch) for time in times for of in (0.05, 0.1)]
    weights = fit_profile(profiles, Profile(std, steps * batch)).weights
    made = sum(
        w * averages[of][time - 1]
        for w, (time, of) in zip(weights, ((t, o) for t in times for o in (0.05, 0.1)), strict=True)
    )
    assert made == pytest.approx(averages[std][-1], abs=bound)
    assert abs(made - averages[0.1][-1]) > bound or std == 0.07


@pytest.mark.parametrize(("std", "amplification"), [(0.15, 1.7), (0.02, 37.0)])
def test_the_growth_of_rounding_errors_is_that_of_the_released_code(std: float, amplification: float) -> None:
    """Sum of absolute weights with 64 snapshots of 0.05 and 0.1, as NVlabs/edm2's solver gives it."""
    profiles = [Profile(of, time) for time in range(1, 65) for of in (0.05, 0.1)]
    weights = fit_profile(profiles, Profile(std, 64)).weights
    assert np.abs(weights).sum() == pytest.approx(amplification, rel=0.03)
    assert weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(("std", "snapshots"), [(0.01, 1), (0.15, 1), (0.03, 16), (0.25, 16), (0.15, 64)])
def test_the_distance_is_that_of_the_profiles(std: float, snapshots: int) -> None:
    """By numeric integration of both profiles over time."""
    profiles = [Profile(of, 1000 * time) for time in range(1, snapshots + 1) for of in (0.05, 0.1)]
    wanted = Profile(std, 1000 * snapshots)
    fit = fit_profile(profiles, wanted)
    times = (np.arange(400_000) + 0.5) / 400_000 * wanted.images

    def density(profile: Profile) -> np.ndarray:
        exponent = power_exponent(profile.std)
        inside = times <= profile.images
        return np.where(inside, (exponent + 1) * (times / profile.images) ** exponent / profile.images, 0.0)

    made = sum(weight * density(profile) for weight, profile in zip(fit.weights, profiles, strict=True))
    expected = np.linalg.norm(made - density(wanted)) / np.linalg.norm(density(wanted))
    assert fit.distance == pytest.approx(expected, rel=2e-2, abs=1e-3)
