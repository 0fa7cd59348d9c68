"""Floor 0: numbers and tensors. Pure functions; imports math and torch only."""
