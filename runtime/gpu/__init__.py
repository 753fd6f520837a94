"""Entries on GPUs: the pool that ranks read from one another, and the layer-step over it."""
