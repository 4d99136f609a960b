"""Base models: where they come from, what a family calls its modules, and the frozen classifier over them."""

from fedlora.models.classifier import Classifier, load_classifier
from fedlora.models.source import ModelSource, locate_model

__all__ = ["Classifier", "ModelSource", "load_classifier", "locate_model"]
