"""Checkers in processes of their own, which can be confined, and killed at any moment.

    service (pool) ──► nursery ──fork──► worker: one item at a time ──fork──► program (python_tests only)

The nursery has imported what the checkers need, so that a killed worker is replaced in milliseconds. There is one for
all built-in checkers, and one for each other, whose imports are code that nobody here knows. When a process
of this chain dies, the kernel kills what is to its right.
"""
