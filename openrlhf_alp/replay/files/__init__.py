"""The file of a recorded batch: its format, writing and reading it, and converting to it."""
