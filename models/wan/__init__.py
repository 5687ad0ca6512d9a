"""Wan, the text-to-video model of diffusers: OSP-Next's weights as one, and how it is trained."""
