"""The report of a run: figures, balance verdict and the HTML page."""
