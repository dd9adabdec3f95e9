"""The demo: the main job for real, from nothing to an adapter that answers better than its base model."""
