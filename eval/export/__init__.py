"""Export distilled datasets and their classifiers to formats that other programs read. Loads no model."""
