"""Images in: sources, order, batches. The only room that may import tensorflow."""
