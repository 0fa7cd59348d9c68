"""Floor 1: one torch model, its masks, and what is done with them."""
