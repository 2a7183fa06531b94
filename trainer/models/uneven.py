"""Models of uneven blocks for transformers, which has no class for them: one that goes along."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.models.layer_sizes import SUFFIX

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE = "modeling_uneven.py"
"""Name of the file of its classes, here and in the folder of such a model."""
SOURCE = Path(__file__).with_name(FILE)


def uneven_config(family: str, values: dict[str, Any]) -> "PreTrainedConfig":
    """transformers' config of an uneven model of `family`, which then can be built and loaded in
    this process without its file; `values` as in config.json."""
    name = register(family)
    classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "ForCausalLM"}
    module = SOURCE.stem
    auto_map = {auto: f"{module}.Uneven{name}{own}" for auto, own in classes.items()}
    stated = {"architectures": [f"Uneven{name}ForCausalLM"], "auto_map": auto_map}
    config: PreTrainedConfig = _class(f"Uneven{name}Config")(**values | stated)
    return config


def _class(name: str) -> Any:
    from trainer.models import modeling_uneven

    return getattr(modeling_uneven, name)


@cache
def register(family: str) -> str:
    """Makes the family's classes of uneven blocks known to transformers in this process, so that it
    loads such folders without their file; returns how the names of the family's classes begin."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.models.modeling_uneven import NAMES

    name = NAMES[family]
    config: Any = _class(f"Uneven{name}Config")
    AutoConfig.register(f"{family}{SUFFIX}", config, exist_ok=True)
    AutoModelForCausalLM.register(config, _class(f"Uneven{name}ForCausalLM"), exist_ok=True)
    return name
