"""Labels and features of a whole batch from the gradient of the head (ALGORITHMS §4)."""
