"""The average of the weights that --ema asks for."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness.errors import UserError, first_line, is_explained
from harness.training.config import TrainConfig


def build_average(
    config: TrainConfig, model: nn.Module, checkpoint: dict[str, Any] | None
) -> AveragedModel | None:
    """Build the average of the weights that --ema asks for, or restore it and the weights."""
    if config.ema is None:
        return None
    average_numbers = get_ema_multi_avg_fn(config.ema)

    def update(averages: Sequence[Tensor], states: Sequence[Tensor], count: Tensor | int) -> None:
        """Average states of one dtype. Integers are copied: rounding would change an index."""
        if averages[0].is_floating_point() or averages[0].is_complex():
            average_numbers(averages, states, count)
        else:
            for average, state in zip(averages, states, strict=True):
                average.copy_(state)

    try:
        average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    except (RuntimeError, TypeError) as error:  # of copy.deepcopy, as with torch's old weight_norm
        if is_explained(error):
            raise
        raise UserError(
            f"--ema: --arch {config.arch} cannot be copied ({first_line(error)})"
        ) from None
    if checkpoint is not None:  # its "model" is the average, its "trained" the weights
        try:
            model.load_state_dict(checkpoint["trained"])
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            if is_explained(error):
                raise
            raise UserError(
                f"{config.resume}: its weights beside --ema's average do not fit the model: restore"
                " the file"
            ) from None
        average.n_averaged.fill_(len(checkpoint["log"]))  # at 0 the next step copies
    return average
