"""Networks by name: a torch-free registry and specification, and what builds and describes them."""
