"""Are the ops right on this machine?

    python -m leaf_kernels.testing                        # on a GPU the kernels, on a CPU what serves there
    TRITON_INTERPRET=1 python -m leaf_kernels.testing     # the kernels in Triton's interpreter

Prints what a bug report should say about the environment, then a line per op: its error against fp64 and what it may be.
Seconds; on a GPU kernels that have to be compiled first take longer. Exit status 0: every op passed.
"""

from __future__ import annotations

import sys

from .selfcheck import environment, here, run


def main() -> int:
    where = here()
    for name, value in environment(where):
        print(f"{name:14}{value}")
    print()
    failed = []
    for outcome in run(where):
        print(outcome, flush=True)
        if outcome.failure:
            failed.append(outcome.op)
    print()
    print(f"failed: {', '.join(failed)}" if failed else "every op passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
