"""The benchmark of 24 perturbations: registry, measuring, result store, metrics, tables, plots."""

import os

# No figure is shown, and the backend that a notebook names may not be installed. Matplotlib reads
# this when it is imported.
os.environ["MPLBACKEND"] = "agg"
