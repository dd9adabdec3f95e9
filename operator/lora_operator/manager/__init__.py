"""The process: the queue of keys, the endpoints, and how all of it starts and stops."""
