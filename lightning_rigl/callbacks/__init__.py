"""Floor 2: the only floor that imports lightning."""
