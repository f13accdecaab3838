"""What marks a token that nothing is trained on, for the rooms that make labels and those that learn from them."""

__all__ = ["IGNORED"]

IGNORED = -100
"""The label that torch's cross entropy leaves out unless told otherwise."""
