"""Why an image cannot be used."""

from __future__ import annotations

from imnet_prep.types import Reason


class ImageFault(Exception):
    """An image that cannot be used: the reason and the detail of its rejection."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail
