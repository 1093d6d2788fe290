"""Quantised weights, which are codes and scales: what tells them, and what may not be done with them."""
