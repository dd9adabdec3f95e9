"""``make bench-gpu``: the trainer on one GPU machine without internet; random weights, everything else is real."""
