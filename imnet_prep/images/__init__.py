"""What the bytes of an image show: its format, header, pixels, and whether it is whole."""
