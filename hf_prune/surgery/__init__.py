"""The plan carried out: units really removed, and what stays re-fitted to repair the damage."""
