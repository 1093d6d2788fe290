"""Callbacks for people's training loops. Each module imports its own library at its top, and is imported by nobody but the person's code.

They only call the library's verbs at the right moment: what is transferred, frozen or thawed is decided by these.
"""
