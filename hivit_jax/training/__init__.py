"""The train step, its optimizer and its learning rate schedule."""
