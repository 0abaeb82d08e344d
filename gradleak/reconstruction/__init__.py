"""Images from gradients: exactly for MLPs, by matching for everything else, and certified."""
