"""Products that skip the zeros of a sparse weight, forward and backward, on several backends."""
