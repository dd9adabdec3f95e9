"""Rules that people may want to look up, one a file. All pure."""
