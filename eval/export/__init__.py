"""Export: a distilled dataset, or the classifier behind it, as others keep such things. Loads no model."""
