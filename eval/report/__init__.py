"""Write a report on runs and their evaluations as one HTML file. Loads no model."""

import logging

# Without a home folder, matplotlib logs a long warning that its cache is elsewhere.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
