"""Where bytes lie: a file on disk, or one in memory; and which ranges of it a tensor is.

Rule: ranges in, bytes out. Nothing here knows a format, and no other module names what only POSIX has.
"""
