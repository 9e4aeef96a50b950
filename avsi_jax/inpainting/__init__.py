"""Restores the gaps in a user's clip: the Inpainter API and the command avsi-inpaint."""
