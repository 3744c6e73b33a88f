"""Compiled protocol buffers (`make proto`): committed, never edited."""
