"""A plain, readable DeepSeek-V4: no kernels, nothing of dsv4fuse. Start at model.py."""

from .config import PRESETS, Config
from .load import load_transformers, randomize
from .model import Transformer

__all__ = ["PRESETS", "Config", "Transformer", "load_transformers", "randomize"]
