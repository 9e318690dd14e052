"""One file for each endpoint, or each few that belong together."""
