"""Networks built from neural graphs, made by name with :func:`create_model`."""

from models import mbv1, mbv1_dnw, resnet, tiny
from models.registry import ModelConfig, create_model, list_models, model_options, register_model

__all__ = [
    "ModelConfig",
    "create_model",
    "list_models",
    "mbv1",
    "mbv1_dnw",
    "model_options",
    "register_model",
    "resnet",
    "tiny",
]
