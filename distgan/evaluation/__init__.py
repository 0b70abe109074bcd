"""Generator metrics: detectors, moments of their features, and distances between distributions of features."""
