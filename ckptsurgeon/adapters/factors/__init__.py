"""Adapters between a weight and the factors that a layer holds in its place."""
