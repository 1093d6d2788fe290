"""Layouts that shapes can't show: which links are in doubt about the order of their elements, and between which layouts. Pure."""
