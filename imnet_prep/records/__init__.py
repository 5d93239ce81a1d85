"""The records folder: its formats, every read of it, every scan over it, and how a change of it is published."""
