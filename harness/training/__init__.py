"""Training: the eight methods, Manifold Mixup, augmentation, the configuration, the log."""
