"""What composes circuits, directions and controls into answers: the `explain` job."""
