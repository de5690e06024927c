"""Defenses that filter the training data or train a clean model from poisoned data. One file a method."""
