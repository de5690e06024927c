"""The analysis tools, one file each."""
