"""Evaluate synthetic images: train on them, test on held-out features of the store."""
