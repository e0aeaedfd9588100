"""The device and the software that a run computes with."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision

from harness import distributed
from harness.errors import UserError, first_line


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the context of --amp."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def resolve_device(name: str) -> str:
    """Return a checked device name. "auto" becomes the accelerator of this machine, or "cpu".

    Under torchrun "cuda" becomes one GPU per process. Raises `UserError` if it cannot be used.
    """
    processes = distributed.world_size()
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found and (processes == 1 or found.type == "cuda") else "cpu"
    if processes > 1 and name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: {processes} processes need cuda (one GPU each) or cpu")
    try:
        if processes > 1 and name == "cuda":
            name = f"cuda:{distributed.local_rank()}"
            torch.cuda.set_device(name)
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: {first_line(error).split('. ')[0]}") from None
    return name


def environment_info(device: str) -> dict[str, str]:
    """Return the versions and the hardware that results depend on besides the settings."""
    root = Path(__file__).resolve().parent.parent  # and no repository around it
    git = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    git += ["describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        revision = ""
    cuda = device.startswith("cuda")
    hardware = torch.cuda.get_device_name(device) if cuda else f"{device} {platform.machine()}"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # torch's own string class is refused by weights_only
        "torchvision": torchvision.__version__,
        "revision": revision or "unknown",
        "hardware": hardware,
    }


def require_same_on_all_ranks(*values: Any) -> None:
    """Raise `UserError` unless all processes of the job pass the same values."""
    if any(other != values for other in distributed.all_gather(values)):
        raise UserError(
            "the processes of the job find different images or weights: every machine needs the"
            " same files, and an --output-dir that all machines share"
        )
