"""Pretrained models that registry packages ship, as Hugging Face checkpoints."""

from hasten.packaged.catalogue import MODELS, checkpoint, original

__all__ = ["MODELS", "checkpoint", "original"]
