"""The dashboard: one file for each page, or for a few that belong together."""
