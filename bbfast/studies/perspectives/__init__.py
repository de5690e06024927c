"""The ten perspectives of BackdoorBench, one file each."""
