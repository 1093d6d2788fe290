"""Adapters that compute values from quantised codes and their scales."""
