"""A package of somebody's who uses distgan: own networks, losses and optimizer. docs/extending.md explains it."""
