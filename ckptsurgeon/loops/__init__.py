"""Callbacks for training loops of Lightning and Hugging Face. Each module imports its library at its top; only user code imports it.

The callbacks only call `transfer`, `freeze` and `Thaw` at the right moment, which decide what is transferred, frozen or thawed.
"""
