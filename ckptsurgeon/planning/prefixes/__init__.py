"""Finds the prefix between a source's names and a target's, its rivals, and exchanges of one prefix for another."""
