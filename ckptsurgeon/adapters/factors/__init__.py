"""Adapters between a weight and the factors that a layer stores instead of it."""
