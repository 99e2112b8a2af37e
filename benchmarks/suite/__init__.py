"""What asv measures over the history of the project. ``make bench``."""
