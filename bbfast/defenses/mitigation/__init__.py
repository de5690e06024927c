"""Defenses that repair a trained model. One file a method; files are found by the registry."""
