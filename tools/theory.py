"""Run experiments on GAN theory: each prints its measurements next to the theory and draws figures in docs/theory/."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.experiments import mode_coverage, optimal_discriminator, vanishing_gradients  # noqa: E402

EXPERIMENTS = {
    "optimal-discriminator": optimal_discriminator.main,
    "vanishing-gradients": vanishing_gradients.main,
    "mode-coverage": mode_coverage.main,
}


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"{', '.join(EXPERIMENTS)} (default: all)")
    for name in parser.parse_args().experiments or EXPERIMENTS:
        EXPERIMENTS[name](ROOT / "docs" / "theory")


if __name__ == "__main__":
    main()
