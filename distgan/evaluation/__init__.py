"""Metrics of generators: detectors, moments of their features, and distances between these."""
