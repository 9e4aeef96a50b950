"""The Inpainter API and the command avsi-inpaint: gaps of a user's clip, restored."""
