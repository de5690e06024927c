"""Defenses that score training samples, incoming images or models. One file a method."""
