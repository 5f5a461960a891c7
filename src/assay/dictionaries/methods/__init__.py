"""The registered methods of dictionaries; importing this package imports no torch."""
