"""Reading bytes from files, on disk or in memory, and the ranges of bytes that a tensor consists of.

Rule: this folder knows nothing of formats, and no other folder uses functions that only POSIX has.
"""
