"""Gradients and weights as other programs save them."""
