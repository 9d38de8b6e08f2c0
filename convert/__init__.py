"""Sources to training files."""
