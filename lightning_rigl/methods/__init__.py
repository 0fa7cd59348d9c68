"""Floor 0: what each paper decides. One file per method; it imports `base` and pure helpers of topology."""
