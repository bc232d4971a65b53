"""The train step, its optimizer and learning rate schedule, and early stopping."""
