"""The registered methods of directions. Importing them imports no torch."""
