"""Frozen feature extractors: name them, build them, preprocess for them, identify them. Knows no stage."""
