"""The report: runs and their evaluations as one HTML file. Loads no model."""
