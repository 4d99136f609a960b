"""Modules put in the place of a classifier's own, and the way back: a run may change in the middle what it adapts."""

from __future__ import annotations

from torch import nn

from fedlora.errors import AdapterError
from fedlora.models import Classifier


class Replacement(nn.Module):
    """Stands in the place of `base`, a linear map of the classifier that it leaves as it is."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base


class Attachment:
    """What one back end has replaced in a classifier."""

    def __init__(self, classifier: Classifier) -> None:
        """Nothing is replaced yet.

        Raises:
            AdapterError: another back end is attached, whose modules would be adapted once more.
        """
        if is_attached(classifier):
            raise AdapterError("another back end is attached to this classifier; detach it first")
        self._classifier = classifier
        self._originals: list[tuple[str, nn.Module]] = []

    def replace(self, path: str, original: nn.Module, replacement: nn.Module) -> None:
        """Put `replacement` where `original` is; paths as in `Classifier.replace_module`."""
        self._classifier.replace_module(path, replacement)
        self._originals.append((path, original))

    @property
    def holds(self) -> bool:
        """Whether anything is replaced."""
        return bool(self._originals)

    def undo(self) -> None:
        """Put all originals back, the last first, since one may lie inside another."""
        while self._originals:
            self._classifier.replace_module(*self._originals.pop())

    def confirm(self) -> None:
        """Before every forward: a detached back end would see the bare model and not say so.

        Raises:
            AdapterError: nothing is replaced any more.
        """
        if not self.holds:
            raise AdapterError("this back end was detached from its classifier; use the one attached since")


def is_attached(classifier: Classifier) -> bool:
    """Whether any of its modules is replaced."""
    return any(isinstance(module, Replacement) for module in classifier.modules())
