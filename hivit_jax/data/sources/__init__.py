"""Dataset sources: number of examples, class names, and encoded examples by index."""
