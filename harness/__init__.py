"""Everything that train.py, evaluate.py and reproduce.py share; nothing here imports a script.

harness             errors, files, command line, models, checkpoints, distributed
harness.images      datasets, the decoded cache, the embedded set, minibatches
harness.training    the eight training methods, the configuration of train.py
harness.benchmark   the 24 perturbations: registry, measuring, result store, metrics, tables, plots
harness.reproduction  the paper's numbers beside ours, the plan, the report
"""
