"""What a person reads: each report in about twenty lines, keys folded, totals that reconcile, and the command to run next.

Every name is made printable, so that a key can't steer a terminal. With `verbose` nothing is folded or left out; `width` is the
terminal's, in columns, and None where there is no terminal, so that a file or a program gets each row on one line.
"""
