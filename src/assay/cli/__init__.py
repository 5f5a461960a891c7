"""The command line: one of the doors to the same studies, generated from the registered methods."""
