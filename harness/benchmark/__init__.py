"""The benchmark of 24 perturbations: registry, measuring, result store, metrics, tables, plots."""
