"""The train step, its optimizer and schedule."""
