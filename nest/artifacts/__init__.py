"""Folders written whole or not at all, read without trust, with what they record of their making."""
