"""``make soak``: many small runs on a control plane that fails all the while, each with one right end."""
