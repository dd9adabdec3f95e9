"""A run as it was observed, and what may be decided about it. All pure."""
