"""Classifier heads of trained, pretrained, untrained and random networks, and gradients of them."""
