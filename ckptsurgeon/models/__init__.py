"""Everything that needs a live model: building it, its names and shapes, initial values, parameter groups, and verification on a device.

Only modules of this folder may import torch at their top; some don't need it. They read no file headers and don't decide which weights go
where.
"""
