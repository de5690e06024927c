"""What defenses build into a model besides its weights. One file an addition; files are found by the registry."""
