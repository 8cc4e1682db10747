"""Searches on models that are really built: for better widths, and for the most that may go."""
