"""The stages of the pipeline: each takes a bundle and returns it with what it found."""
