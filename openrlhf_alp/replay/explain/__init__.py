"""Where and why learner and engine differ on a batch."""
