"""A calculus of layers: what each passes down, and what its gradient says of its input (§6)."""
