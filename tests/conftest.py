"""For all tests."""

from __future__ import annotations

import torch

# Models here are tiny: a second thread costs more than it brings, and spins when the other core is busy.
torch.set_num_threads(1)
