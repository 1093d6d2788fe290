"""Everything that needs a live model: building it, its skeleton, its initial values, parameter groups, and the proof on a device.

The one folder whose modules may import torch at their top (not all of them need it). It reads no header
and decides nothing about which weights go where.
"""
