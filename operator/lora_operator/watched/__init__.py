"""The cluster as the watches show it: views of objects, the cache of them, and what fills it."""
