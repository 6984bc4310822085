"""Command lines: parse, wire, call. `main.py` holds the table of commands of `openrlhf-alp`."""
