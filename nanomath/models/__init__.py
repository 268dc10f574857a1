"""Models: the transformer, Hugging Face checkpoints in and out, the tokenizer."""

from nanomath.models.directory import resolve_model_dir
from nanomath.models.hf import check_vocabulary, load_model, save_model
from nanomath.models.tokenizer import Tokenizer, load_tokenizer
from nanomath.models.transformer import ModelConfig, Transformer

__all__ = [
    "ModelConfig",
    "Tokenizer",
    "Transformer",
    "check_vocabulary",
    "load_model",
    "load_tokenizer",
    "resolve_model_dir",
    "save_model",
]
