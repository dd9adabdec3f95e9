"""What to do next about a run: a decision for each state that it can be in. All pure."""
