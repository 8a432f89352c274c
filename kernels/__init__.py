"""Drop-in kernels for self-supervised vision transformers."""
