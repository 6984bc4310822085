"""Static pages that open from disk: one file, nothing from a network."""
