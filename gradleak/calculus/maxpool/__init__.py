"""The input of a convolution under max-pooling, from the pooled map and the gradient (§6e)."""
