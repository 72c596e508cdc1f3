"""The replay layer: one store for steps, views that turn it into batches, readers that fill it."""
