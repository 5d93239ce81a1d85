"""The optional C++ batch JPEG decoder."""
