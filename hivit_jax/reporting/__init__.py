"""Terminal output, metrics and figures of a run."""
