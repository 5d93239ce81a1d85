"""Read images from archives, folders, Kaggle's layout, Tiny-ImageNet or a download, without a temporary copy.

:func:`detect` recognizes the layout of each path, :func:`merge` (or :meth:`Source.refs`) yields the images in order,
and :func:`read` returns the bytes of one.
"""

from imnet_prep.sources.base import Found, Source, merge, read
from imnet_prep.sources.detect import detect

__all__ = ["Found", "Source", "detect", "merge", "read"]
