"""One batch through every method: the update, its results, tables and pictures."""
