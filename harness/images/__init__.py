"""Image datasets as uint8 tensors: folders, CIFAR, the embedded set; minibatches of them."""
