"""Say which decoder is in use, and what it costs to do without the C++ one."""

from imnet_prep.images.native import decoder_status

# How many times slower photographs are handled without the C++ decoder, measured on 2 cores: docs/install.md.
SLOWER_DOWNLOAD = 1.7
SLOWER_CONVERSION = 1.9
SLOWER_BATCHES = 2.6


def describe_decoder(slower: float) -> str:
    """Return one line that names the decoder in use; without the C++ one also why not, and what that costs."""
    built, text = decoder_status()
    return f"C++ decoder ({text})" if built else f"OpenCV and Pillow decode, about {slower:g} times slower: {text}"
