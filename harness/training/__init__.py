"""Training: the eight methods, the configuration of train.py, its log."""
