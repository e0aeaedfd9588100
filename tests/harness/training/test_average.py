"""Test what --ema averages. tests/test_train.py checks the average of the weights."""

import pytest
import torch
from torch import nn

from harness.training.average import build_average
from harness.training.config import parse_train_config


@pytest.mark.parametrize("decay", ["0.9", "0.9999"])
def test_integers_are_copied_and_not_rounded(decay: str) -> None:
    """Check buffers such as the indices of a Swin Transformer, and BatchNorm's counter."""
    config, _ = parse_train_config(["--ema", decay])
    model = nn.BatchNorm1d(2)
    model.index = nn.Buffer(torch.arange(400))
    model.wave = nn.Buffer(torch.zeros(1, dtype=torch.complex64))
    average = build_average(config, model, None)
    assert average is not None
    for _ in range(3):
        model(torch.rand(4, 2))
        model.wave += 1j
        average.update_parameters(model)
    kept = average.module
    assert torch.equal(kept.index, torch.arange(400)) and kept.num_batches_tracked == 3
    assert not torch.equal(kept.running_mean, model.running_mean)
    assert 1 <= kept.wave.item().imag < 3  # averaged, from 1j on
