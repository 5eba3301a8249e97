"""For all tests."""

from __future__ import annotations

import os

import torch

# Without a GPU kernels run in Triton's interpreter, which has to be asked for before a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Models here are tiny: a second thread costs more than it brings, and spins when the other core is busy.
torch.set_num_threads(1)
