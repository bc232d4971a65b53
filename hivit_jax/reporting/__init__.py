"""Terminal, metrics and figures."""
