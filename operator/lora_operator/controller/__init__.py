"""One look at one object: observe, ask, decide, act, write the status."""
