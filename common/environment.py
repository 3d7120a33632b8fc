"""What must stand in the environment before torch is imported, unless the user put something else there."""

import os


def prepare_environment() -> None:
    """Expandable segments keep a long run's memory from breaking into pieces; torch reads either name."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & (os.environ.keys() - _OURS):
            os.environ[name] = "expandable_segments:True"
            _OURS.add(name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_OURS: set[str] = set()
