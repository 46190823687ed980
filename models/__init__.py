"""Networks built from neural graphs; :func:`create_model` builds them by name."""

from models import mbv1, mbv1_dnw, resnet, tiny
from models.allenai import load_allenai
from models.registry import (
    ModelConfig,
    create_model,
    list_models,
    model_config,
    model_options,
    register_model,
)

__all__ = [
    "ModelConfig",
    "create_model",
    "list_models",
    "load_allenai",
    "mbv1",
    "mbv1_dnw",
    "model_config",
    "model_options",
    "register_model",
    "resnet",
    "tiny",
]
