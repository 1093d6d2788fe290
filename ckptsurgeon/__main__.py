"""`python -m ckptsurgeon` is the command line."""

from ckptsurgeon.cli.main import main

main()
