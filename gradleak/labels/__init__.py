"""Recovering the label and the head's input feature from the gradient of the classifier head."""
