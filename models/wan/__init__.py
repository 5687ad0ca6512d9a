"""Wan, the text-to-video model of diffusers: how it is trained here."""
