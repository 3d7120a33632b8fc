"""What must stand in the environment before torch is imported, unless the user put something else there."""

import os

ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The new name and the old one: which is read depends on the release of torch."""


def prepare_environment() -> None:
    """Expandable segments keep a long run's memory from breaking into pieces. OpenMP threads that wait by sleeping
    cost little on an idle machine, and on a busy one they spare a factor of eight (docs/log.md, 2026-11-21)."""
    if not any(name in os.environ for name in ALLOCATOR_NAMES):
        os.environ |= dict.fromkeys(ALLOCATOR_NAMES, "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
