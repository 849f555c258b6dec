"""The report: runs and their evaluations as one HTML file. Loads no model."""

import logging

# Where there is no home, matplotlib caches elsewhere and warns of it at length; nothing is lost.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
