"""Input pipeline on the host: sources, sample order, transforms and batches."""
