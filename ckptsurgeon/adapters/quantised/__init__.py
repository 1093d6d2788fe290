"""Adapters that make values of quantised codes and what stands beside them."""
