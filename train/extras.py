"""What a configuration wants beyond the plain install: asked for before anything is loaded."""

from importlib.util import find_spec

from common.errors import BadUsage
from train.config import TrainConfig


def require_extras(config: TrainConfig) -> None:
    wanted = {"lora": ("peft", config.lora is not None), "tensorboard": ("tensorboard", config.tensorboard)}
    for key, (package, is_wanted) in wanted.items():
        if is_wanted and find_spec(package) is None:
            raise BadUsage(wrong=f"{key}: {package} is not installed", found=f"no module {package}",
                           mend=f"pip install -e '.[{key}]', or set {key} to its default")  # fmt: skip
