"""The API server: the one client, and what it needs. Nothing here knows what a run is for."""
