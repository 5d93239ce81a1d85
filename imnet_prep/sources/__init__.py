"""Images as people have them: archives, folders, Kaggle, Tiny-ImageNet, a download; no temporary tree.

:func:`detect` tells the layout of each path, :func:`merge` (or :meth:`Source.refs`) gives the images in order, and
:func:`read` gives the bytes of one.
"""

from imnet_prep.sources.base import Found, Source, SourceInfo, SourceSummary, SplitSummary, merge, read
from imnet_prep.sources.detect import detect

__all__ = ["Found", "Source", "SourceInfo", "SourceSummary", "SplitSummary", "detect", "merge", "read"]
